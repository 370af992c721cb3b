"""training/config.py: the one description of a run."""

import ast
import inspect
import json
import os
import re
from typing import Any

import pytest
from pydantic import ValidationError

from styleloom.training import config
from styleloom.training.config import (
    FREE,
    PRESETS,
    Run,
    Section,
    StyleGAN2Network,
    flat,
    protected_differences,
    read_run,
    write_run,
)

RULES = ("explosion", "gap", "memorised", "collapse", "saturation")


def changed(run, **dotted):
    """`run` with the fields (dots written as __) set, validated again."""
    values = run.model_dump()
    for name, value in dotted.items():
        *sections, field = name.split("__")
        inner = values
        for section in sections:
            inner = inner[section]
        inner[field] = value
    return Run.model_validate(values)


def test_the_presets_of_the_contract_are_there():
    contract = {
        "stylegan2-cpu", "stylegan2-256", "stylegan2-512", "stylegan2-1024", "progressive-1024", "stylegan1-1024",
    }  # fmt: skip
    assert contract <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_carry_their_name(name):
    run = PRESETS[name]
    assert run.preset == name
    assert Run.model_validate(run.model_dump()) == run


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_run_json(name, tmp_path):
    its: dict[str, Any] = {"recipe__r1_gamma": 0.1, "growth__lr": ((4, 0.1), (8, 1e-9))}
    if PRESETS[name].recipe.kind == "r3gan":
        its = {"recipe__gamma": 0.1}
    run = changed(PRESETS[name], data__path="/somewhere/ä", seed=2**63 - 1, **its)
    write_run(run, tmp_path / "run.json")
    assert read_run(tmp_path / "run.json") == run
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("section", [None, "data", "network", "recipe", "ema"])
def test_unknown_fields_are_refused_by_name(section, tmp_path):
    values = Run().model_dump()
    (values[section] if section else values)["colour"] = 1
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(ValidationError, match="colour"):
        read_run(tmp_path / "run.json")


def test_a_cut_run_json_is_a_value_error(tmp_path):
    write_run(Run(), tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="Invalid JSON"):
        read_run(tmp_path / "run.json")


def test_runs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Run().seed = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("batch", 0),
        ("total_kimg", 0),
        ("precision", "fp64"),
        ("recipe__lr", 0),
        ("recipe__style_mixing", 1.5),
        ("recipe__pl_interval", 0),
        ("network__mbstd_group", 0),
        ("network__kind", "stylegan3"),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValidationError, match=name.split("__")[-1]):
        changed(Run(), **{name: value})


@pytest.mark.parametrize(("batch", "passes", "group"), [(6, 1, 4), (8, 4, 4), (12, 2, 4)])
def test_a_batch_must_divide_into_minibatch_std_groups(batch, passes, group):
    with pytest.raises(ValidationError, match=r"change batch, passes or network\.mbstd_group"):
        Run(batch=batch, passes=passes, network=StyleGAN2Network(mbstd_group=group))
    assert Run(batch=group * passes, passes=passes, network=StyleGAN2Network(mbstd_group=group)).batch == group * passes


def test_flat_has_dotted_names():
    values = flat(Run(seed=5))
    assert values["seed"] == 5
    assert values["recipe.lr"] == 0.0025
    assert not any(isinstance(value, dict) for value in values.values())


def test_protected_differences_name_what_differs():
    old = PRESETS["stylegan2-cpu"]
    new = changed(old, seed=1, recipe__lr=0.001, network__z_dim=64)
    assert sorted(protected_differences(old, new)) == [
        "network.z_dim: 128 -> 64",
        "recipe.lr: 0.003 -> 0.001",
        "seed: 0 -> 1",
    ]
    assert protected_differences(old, old) == []


def test_free_fields_exist_and_may_change():
    old = Run()
    values = {
        "preset": "other",
        "data.path": "elsewhere",
        "data.verify": "hash",
        "data.cache": "there",
        "data.max_bad": 0.5,
        "out": "there",
        "passes": 2,
        "recompute": True,
        "parallel.strategy": "deepspeed",
        "parallel.zero_stage": 2,
        "parallel.overlap": "off",
        "metrics.names": ("kid",),
        "metrics.inception": "there",
        "metrics.lpips": "there",
        "metrics.resize": "legacy",
        "metrics.cache": "there",
        "health.memorised_limit": 0.9,
        **dict.fromkeys(["health.nonfinite", *(f"health.{rule}" for rule in RULES)], "roll-back"),
    }
    new = changed(old, **{name.replace(".", "__"): values.get(name, 7) for name in FREE})
    assert {name for name in flat(old) if flat(old)[name] != flat(new)[name]} == FREE
    assert protected_differences(old, new) == []


def test_zero_stage_3_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ZeRO stage 3 .* cannot differentiate through them twice"):
        changed(Run(), parallel__strategy="deepspeed", parallel__zero_stage=3)


def test_durations_cadences_and_paths_are_free():
    assert {"total_kimg", "tick_kimg", "checkpoint_kimg", "snapshot_kimg", "data.path", "data.workers", "out"} <= FREE


def test_what_shapes_the_result_is_protected():
    """A field added to FREE by mistake would silently break exact resume."""
    shaping = ("network.", "recipe.", "growth.", "ema."), ("seed", "batch", "data.window", "precision")
    for name in {name for run in PRESETS.values() for name in flat(run)}:
        if name.startswith(shaping[0]) or name in shaping[1]:
            assert name not in FREE


def fields_and_help():
    """(class, field, the string below it or "") of every plain field in the sections' source."""
    sections = {name: x for name, x in vars(config).items() if isinstance(x, type) and issubclass(x, Section)}
    for node in ast.parse(inspect.getsource(config)).body:
        if not (isinstance(node, ast.ClassDef) and node.name in sections):
            continue
        for item, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation) in {*sections, "Network", "Recipe"}:
                continue
            said = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else ""
            yield node.name, ast.unparse(item.target), str(said)


def own_fields(section):
    """(class that declares it, name) of every plain field of a section and of those in it."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from own_fields(value)
        else:
            yield next(x for x in reversed(type(section).__mro__) if name in getattr(x, "__annotations__", {})), name


def test_every_field_has_a_sentence_of_help():
    found = list(fields_and_help())
    fields = {(x.__name__, name) for run in PRESETS.values() for x, name in own_fields(run)}
    assert fields | {(x, name) for x, name, _ in found} == {(x, name) for x, name, _ in found}  # none overlooked
    for section, field, said in found:
        assert said, f"{section}.{field}: no help"
        assert said.endswith("."), f"{section}.{field}: {said!r} is not a sentence"
        assert len(said.split()) > 1, f"{section}.{field}: {said!r} says nothing"


def test_a_write_that_fails_before_its_end_leaves_the_old_run_json(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_run(Run(seed=1), path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)  # the last thing that an atomic write does
    with pytest.raises(OSError, match="No space left"):
        write_run(Run(seed=2), path)
    assert read_run(path) == Run(seed=1)


@pytest.mark.parametrize(
    ("growth", "what"),
    [
        ({"start": 6}, "sizes are 4, 8, 16, 32, ... px, not 6"),
        ({"start": 2}, "sizes are 4, 8, 16, 32, ... px, not 2"),
        ({"batch": ((12, 4),)}, "not 12"),
        ({"lr": ((4, 0.0),)}, "more than 0"),
        ({"batch": ((4, 6),)}, "batch 6 in 1 passes does not divide into minibatch-std groups of 4"),
        ({"start": 4, "stabilise_kimg": 0, "fade_kimg": 0.0001}, "are both 0"),
    ],
)
def test_a_growth_that_is_no_schedule_is_refused(growth, what):
    with pytest.raises(ValidationError, match=re.escape(what)):
        Run.model_validate({"growth": growth})


def test_a_recipe_trains_its_own_networks_only():
    values = PRESETS["progressive-1024"].model_dump() | {"network": Run().network.model_dump()}
    with pytest.raises(ValidationError, match="recipe progressive does not train networks of kind stylegan2"):
        Run.model_validate(values)


def test_msg_does_not_grow():
    values = {"network": {"kind": "msg"}, "recipe": {"kind": "msg"}}
    assert Run.model_validate(values).recipe.kind == "msg"
    with pytest.raises(ValidationError, match="msg shows the discriminator all sizes at once"):
        Run.model_validate(values | {"growth": {"start": 4}})


@pytest.mark.parametrize(
    ("preset", "fields", "what"),
    [
        ("r3gan-256", {"growth__start": 8}, "schedules of its own and does not grow"),
        ("r3gan-256", {"growth__lr": ((64, 0.1),)}, "schedules of its own and does not grow"),
        ("msg-256", {"augment__kind": "ada"}, "augment.kind ada does not go with msg"),
        ("progressive-1024", {"augment__kind": "ada"}, "augment.kind ada does not go with wgan-gp"),
        ("stylegan2-256", {"freeze_d": 2}, "give one with --init"),
        ("stylegan2-256", {"metrics__names": ("pr", "fid")}, "begin with fid or kid"),
        ("stylegan2-256", {"metrics__names": ()}, "begin with fid or kid"),
        ("stylegan2-256", {"ema__sigma_rel": (0.05, 0.3)}, "between 0 and 0.288 and differ"),
        ("stylegan2-256", {"ema__sigma_rel": (0.05, 0.0503)}, "differ within three decimals"),
        ("stylegan2-256", {"augment__kind": "fixed"}, "with augment.p 0 changes nothing"),
        ("stylegan2-256", {"augment__p": 0.3}, "augment.p has no effect with augment.kind none"),
        (
            "stylegan2-256",
            {"augment__kind": "diffaugment", "augment__p": 0.3},
            "has no effect with augment.kind diffau",
        ),
        ("stylegan2-256", {"augment__kind": "ada", "augment__pipe": ()}, "ada without any transform"),
        ("stylegan2-256", {"augment__kind": "diffaugment", "augment__policy": ()}, "diffaugment without any transform"),
        ("stylegan1-1024", {"network__discriminator_mapping_layers": 2}, "of stylegan1 has no mapping"),
        ("r3gan-cpu", {"batch": 15, "passes": 2}, "does not divide into whole images: change batch or passes"),
    ],
)
def test_what_does_not_go_together_is_refused(preset, fields, what):
    with pytest.raises(ValidationError, match=what):
        changed(PRESETS[preset], **fields)
