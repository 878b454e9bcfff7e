"""Strict building of frozen dataclasses from mappings, and the way back."""

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configs
from configs.typed import nearest, type_name


@dataclasses.dataclass(frozen=True)
class Adam:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Muon:
    lr: float = 0.02
    steps: int = 5


@dataclasses.dataclass(frozen=True)
class Layer:
    width: int
    gate: bool = True


@dataclasses.dataclass(frozen=True)
class Run:
    name: str = "run"
    steps: int = 10
    clip: float | None = None
    optimizer: Adam | Muon = Adam()
    extra: Adam | Muon | None = None
    layers: tuple[Layer, ...] = ()
    mixed: tuple[Adam | Muon, ...] = ()
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    schedule: Literal["cosine", "wsd"] = "cosine"
    layer: Layer | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    pair: tuple[int, str] = (1, "a")
    id: int | str = 0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} is negative")


floats = st.floats(allow_nan=False)
adams = st.builds(Adam, floats, st.tuples(floats, floats))
muons = st.builds(Muon, floats, st.integers())
layers = st.builds(Layer, st.integers(), st.booleans())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
runs = st.builds(
    Run,
    name=st.text(),
    steps=st.integers(0, 2**40),
    clip=st.none() | floats,
    optimizer=adams | muons,
    extra=st.none() | adams | muons,
    layers=st.lists(layers, max_size=3).map(tuple),
    mixed=st.lists(adams | muons, max_size=3).map(tuple),
    mixture=st.dictionaries(st.text(), floats, max_size=3),
    schedule=st.sampled_from(["cosine", "wsd"]),
    layer=st.none() | layers,
    options=st.dictionaries(st.text(), json_values, max_size=3),
    pair=st.tuples(st.integers(), st.text()),
    id=st.integers() | st.text(),
)


@given(runs)
def test_a_config_survives_the_way_through_json(run):
    text = json.dumps(configs.to_dict(run))
    again = configs.build(Run, json.loads(text))
    assert again == run
    assert json.dumps(configs.to_dict(again)) == text  # types too: 1 is no 1.0, (1,) is no [1]


@given(runs)
def test_laying_a_whole_config_over_the_defaults_gives_that_config(run):
    assert configs.overlay(Run, configs.to_dict(run)) == configs.to_dict(run)


def test_left_out_keys_take_their_defaults_at_every_depth():
    run = configs.build(Run, {"optimizer": {"kind": "Muon", "steps": 7}, "layers": [{"width": 2}]})
    assert run == Run(optimizer=Muon(0.02, 7), layers=(Layer(2, True),))


def test_an_int_is_taken_for_a_float_and_becomes_one():
    lr = configs.build(Adam, {"lr": 1}).lr
    assert type(lr) is float and lr == 1.0


@pytest.mark.parametrize(
    "mapping, path, wanted",
    [
        ({"steps": True}, "config.steps=True", "int"),
        ({"steps": 1.0}, "config.steps=1.0", "int"),
        ({"steps": "1"}, "config.steps='1'", "int"),
        ({"steps": None}, "config.steps=None", "int"),
        ({"clip": "1"}, "config.clip='1'", "float | None"),
        ({"clip": False}, "config.clip=False", "float | None"),
        ({"name": 3}, "config.name=3", "str"),
        ({"optimizer": {"kind": "Adam", "lr": "x"}}, "config.optimizer.lr='x'", "float"),
        ({"optimizer": None}, "config.optimizer=None", "Adam | Muon"),
        ({"layers": [{"width": 1}, {"width": 2, "gate": 1}]}, "config.layers[1].gate=1", "bool"),
        ({"layers": {"width": 1}}, "config.layers={'width': 1}", "tuple[Layer, ...]"),
        ({"mixture": {"web": "a"}}, "config.mixture.web='a'", "float"),
        ({"schedule": "linear"}, "config.schedule='linear'", "'cosine' | 'wsd'"),
        ({"pair": [1]}, "config.pair=[1]", "tuple[int, str]"),
        ({"id": 1.5}, "config.id=1.5", "int | str"),
        ({"layer": 3}, "config.layer=3", "a mapping of Layer's keys"),
    ],
)
def test_an_ill_typed_value_is_an_error_with_path_value_and_wanted_type(mapping, path, wanted):
    for read in (configs.build, configs.overlay):
        with pytest.raises(configs.ConfigError) as error:
            read(Run, mapping)
        assert path in str(error.value) and f"wanted {wanted}" in str(error.value)


@pytest.mark.parametrize(
    "mapping, path, hint",
    [
        ({"stpes": 1}, "config.stpes", "steps"),
        ({"optimizer": {"kind": "Adam", "beta": 1}}, "config.optimizer.beta", "betas"),
        ({"layers": [{"width": 1, "gates": True}]}, "config.layers[0].gates", "gate"),
        ({"optimizer": {"kind": "Adm"}}, "config.optimizer.kind='Adm'", "Adam"),
        ({"mixed": [{"lr": 1.0}]}, "config.mixed[0] has no 'kind'", "Adam"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(mapping, path, hint):
    for read in (configs.build, configs.overlay):
        with pytest.raises(configs.ConfigError, match="Did you mean|Known here") as error:
            read(Run, mapping)
        assert path in str(error.value) and hint in str(error.value).split(path)[1]


def test_a_missing_required_key_is_an_error_of_build_alone():
    with pytest.raises(configs.ConfigError, match=r"config\.width is required .* wanted int"):
        configs.build(Layer, {})
    assert configs.overlay(Layer, {}) == {"gate": True}


def test_what_a_dataclass_refuses_is_a_config_error_with_its_path():
    with pytest.raises(configs.ConfigError, match=r"demo.py: config: steps=-1 is negative"):
        configs.build(Run, {"steps": -1}, "demo.py: config")


def test_a_type_that_no_config_can_have_is_the_programmers_error():
    @dataclasses.dataclass(frozen=True)
    class Bad:
        when: set = dataclasses.field(default_factory=set)

    with pytest.raises(TypeError, match="not a type that a config field can have"):
        configs.build(Bad, {"when": []})


def test_a_class_with_a_field_named_kind_cannot_be_in_a_union():
    @dataclasses.dataclass(frozen=True)
    class Kinded:
        kind: str = "x"

    made = dataclasses.make_dataclass("Made", [("part", Kinded | Adam)], frozen=True)
    with pytest.raises(TypeError, match="cannot have a field of its own named 'kind'"):
        configs.build(made, {"part": {"kind": "Adam"}})


def test_nearest_finds_a_key_by_its_last_part_and_by_its_whole_path():
    keys = ["train.optimizer.peak_lr", "train.steps", "data.steps", "mesh.tensor"]
    assert nearest("peek_lr", keys) == ["train.optimizer.peak_lr"]
    assert nearest("train.stpes", keys)[0] == "train.steps"
    assert nearest("colour", keys) == []


def test_types_are_written_as_in_the_source():
    assert type_name(float | None) == "float | None"
    assert type_name(tuple[int, ...]) == "tuple[int, ...]"
    assert type_name(dict[str, float]) == "dict[str, float]"
    assert type_name(Adam | Muon) == "Adam | Muon"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = configs.atomic_write(tmp_path / "deep" / "state.json", "old")

    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("configs.files.os.fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        configs.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["state.json"]


def test_bytes_and_text_are_written_as_given(tmp_path):
    assert configs.atomic_write(tmp_path / "a", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert configs.atomic_write(tmp_path / "a", "é\n").read_bytes() == b"\xc3\xa9\n"


def test_without_a_kind_a_part_is_of_its_defaults_class_or_the_first_of_the_union():
    assert configs.build(Run, {"optimizer": {"lr": 1.0}}).optimizer == Adam(1.0)
    assert configs.build(Run, {"extra": {"lr": 1.0}}).extra == Adam(1.0)
    assert configs.overlay(Run, {"extra": {"lr": 1.0}})["extra"]["kind"] == "Adam"
    with pytest.raises(configs.ConfigError, match="optimizer.steps is not a key of Adam"):
        configs.build(Run, {"optimizer": {"steps": 3}})
