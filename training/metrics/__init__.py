"""How good generated images are: distances to real ones, their variety, and how smoothly the latents lead to them."""
