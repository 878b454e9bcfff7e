"""The command line: config files, overrides, --help, and errors that a user can act on."""

import dataclasses
import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import ml_collections
import pytest

import configs
from configs.help import field_docs

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Adam:
    peak_lr: float = 1e-3  # the highest learning rate
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Muon:
    peak_lr: float = 0.02
    steps: int = 5


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    kind: Literal["bpe", "unigram"] = "bpe"
    size: int = 256


@dataclasses.dataclass(frozen=True)
class Config:
    # how long
    # to train
    steps: int = 3
    optimizer: Adam | Muon = Adam()
    clip: float | None = None
    """Largest global norm of the gradient."""
    note: str | None = dataclasses.field(default=None, metadata={"doc": "Anything worth remembering."})
    mixture: dict[str, float] = dataclasses.field(default_factory=lambda: {"web.en": 0.5})
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    stages: tuple[Adam | Muon, ...] = (Adam(), Muon())
    teacher: Muon | None = None
    resume: bool = True
    mode: Literal["fast", "slow"] = "fast"
    tokenizer: Tokenizer = Tokenizer()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Needy:
    init_from: str
    steps: int = 1


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        textwrap.dedent("""
        import ml_collections
        def get_config(size="small"):
            config = ml_collections.ConfigDict()
            config.steps = {"small": 9, "big": 900}[size]
            config.optimizer = ml_collections.ConfigDict({"kind": "Muon", "steps": 7})
            return config
        """)
    )
    return path


def parse(file, *overrides, cls=Config, **options):
    return configs.parse(cls, [f"--config={file}", "--workdir=runs/x", *overrides], **options)


def refused(file, *overrides, cls=Config, **options):
    with pytest.raises(configs.ConfigError) as error:
        parse(file, *overrides, cls=cls, **options)
    return str(error.value)


def test_a_file_is_laid_over_the_defaults(file):
    config, workdir, flags = parse(file)
    assert config == Config(steps=9, optimizer=Muon(0.02, 7))
    assert workdir == Path("runs/x") and flags == {}


def test_what_follows_a_colon_is_given_to_get_config(file):
    assert parse(f"{file}:big").config.steps == 900


@pytest.mark.parametrize(
    "override, expected",
    [
        (["--config.steps=5"], {"steps": 5}),
        (["--config.steps", "5"], {"steps": 5}),
        (["--config.steps=5", "--config.steps=6"], {"steps": 6}),
        (["--config.optimizer.peak_lr=3e-4"], {"optimizer": Muon(3e-4, 7)}),
        (["--config.optimizer.peak_lr=1"], {"optimizer": Muon(1.0, 7)}),
        (["--config.clip=3"], {"clip": 3.0}),
        (["--config.clip=None"], {"clip": None}),
        (["--config.note=5"], {"note": "5"}),
        (["--config.note=a=b c"], {"note": "a=b c"}),
        (["--config.mixture.books=1"], {"mixture": {"web.en": 0.5, "books": 1.0}}),
        (["--config.mixture['web.en']=0.25"], {"mixture": {"web.en": 0.25}}),
        (["--config.mixture={'code': 1}"], {"mixture": {"code": 1.0}}),
        (['--config.mixture={"code": 1}'], {"mixture": {"code": 1.0}}),
        (["--config.names=a,b"], {"names": ("a", "b")}),
        (["--config.names=('a',)"], {"names": ("a",)}),
        (["--config.sizes=4"], {"sizes": (4,)}),
        (["--config.sizes=4,5,6"], {"sizes": (4, 5, 6)}),
        (["--config.sizes="], {"sizes": ()}),
        (["--config.stages[1].steps=8"], {"stages": (Adam(), Muon(0.02, 8))}),
        (["--config.stages[0].kind=Muon"], {"stages": (Muon(), Muon())}),
        (["--config.stages=[{'kind': 'Adam'}]"], {"stages": (Adam(),)}),
        (["--config.teacher.steps=1"], {"teacher": Muon(0.02, 1)}),
        (["--config.teacher={'steps': 1}"], {"teacher": Muon(0.02, 1)}),
        (["--config.resume=false"], {"resume": False}),
        (["--noconfig.resume"], {"resume": False}),
        (["--config.mode=slow"], {"mode": "slow"}),
        (["--config.tokenizer.kind=unigram"], {"tokenizer": Tokenizer("unigram", 256)}),
        (["--config.optimizer.kind=Adam"], {"optimizer": Adam()}),
        (
            ["--config.optimizer.betas=0,1", "--config.optimizer.kind=Adam"],
            {"optimizer": Adam(betas=(0.0, 1.0))},
        ),
        (["--config.optimizer={'kind': 'Adam', 'peak_lr': 1}"], {"optimizer": Adam(1.0)}),
        (["--config.options={'a': [1, None]}"], {"options": {"a": [1, None]}}),
        (["--config.options.depth=3"], {"options": {"depth": 3}}),
    ],
)
def test_an_override_sets_its_key_with_the_type_it_has(file, override, expected):
    config = parse(file, *override).config
    assert config == dataclasses.replace(Config(steps=9, optimizer=Muon(0.02, 7)), **expected)
    for name, value in expected.items():
        assert repr(getattr(config, name)) == repr(value)  # 3 is no 3.0


@pytest.mark.parametrize(
    "override, parts",
    [
        ("--config.stpes=4", ["--config.stpes", "Did you mean --config.steps"]),
        ("--config.optimizer.peek_lr=1", ["--config.optimizer.peek_lr", "--config.optimizer.peak_lr"]),
        ("--config.peak_lr=1", ["--config.peak_lr", "--config.optimizer.peak_lr"]),
        ("--config.optimizer.betas=0,1", ["--config.optimizer.betas is not a key"]),  # the file chose Muon
        ("--config.stages[7].steps=1", ["--config.stages[7].steps is not a key"]),
        ("--config.steps.x=1", ["--config.steps.x is not a key"]),
        ("--config.steps=3.5", ["--config.steps=3.5", "wanted int"]),
        ("--config.steps=True", ["--config.steps=True", "wanted int"]),
        ("--config.clip=x", ["--config.clip=x", "wanted float | None"]),
        ("--config.resume=maybe", ["--config.resume=maybe", "wanted bool"]),
        ("--config.sizes=1,x", ["--config.sizes=1,x", "wanted tuple[int, ...]"]),
        ("--config.sizes=(1, 2.5)", ["config.sizes[1]=2.5", "wanted int"]),
        ("--config.mode=fsat", ["--config.mode=fsat", "'fast' | 'slow'"]),
        ("--config.optimizer.kind=Admm", ["--config.optimizer.kind=Admm", "Adam"]),
        ("--config.optimizer.kind=adam", ["Did you mean Adam?"]),
        ("--config.optimizer=muon", ["wanted Adam | Muon", "Choose one by --config.optimizer.kind=Muon"]),
        ("--config.mixture=web", ["wanted dict[str, float]", "--config.mixture=\"{'NAME': 1.0}\""]),
        ("--config.optimizer={'kind': 'Adam', 'lr': 1}", ["config.optimizer.lr", "peak_lr"]),
        ("--config.=1", ["--config.a.b=value"]),
        ("--worksdir=x", ["--worksdir is not a flag", "workdir"]),
        ("stray", ["'stray' is not a flag"]),
    ],
)
def test_a_wrong_override_is_one_paragraph_that_names_key_value_and_mend(file, override, parts):
    message = refused(file, override)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_setting_a_part_and_something_in_it_is_refused(file):
    message = refused(file, "--config.teacher={}", "--config.teacher.steps=1")
    assert "--config.teacher and --config.teacher.steps" in message


def test_a_required_key_may_come_from_the_command_line(tmp_path):
    path = tmp_path / "needy.py"
    path.write_text("def get_config():\n    return {'steps': 2}\n")
    assert parse(path, "--config.init_from=runs/a", cls=Needy).config == Needy("runs/a", 2)
    assert "config.init_from is required" in refused(path, cls=Needy)


def test_a_saved_config_is_taken_back_as_file_and_as_run_folder(file, tmp_path):
    config = parse(file, "--config.clip=2", "--config.teacher.steps=4").config
    saved = configs.save(config, tmp_path / "run")
    assert saved == tmp_path / "run" / "config.json"
    assert parse(saved).config == config == configs.load(Config, tmp_path / "run")
    assert parse(saved.parent, "--config.steps=1").config == dataclasses.replace(config, steps=1)


def test_a_config_dict_with_everything_in_it_is_read(tmp_path):
    path = tmp_path / "full.py"
    whole = configs.to_dict(Config(names=("x",), teacher=Muon(), options={"a": {"b": [1, {"c": 2}]}}))
    whole["mixture"] = {"web": 1.0}  # a ConfigDict allows no dots in keys
    path.write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({whole!r})\n"
    )
    assert configs.to_dict(parse(path).config) == whole
    reference = ml_collections.ConfigDict({"steps": 4})
    path.write_text(
        "import ml_collections\ndef get_config():\n"
        "    c = ml_collections.ConfigDict({'steps': 4, 'optimizer': {'kind': 'Muon'}})\n"
        "    c.optimizer.steps = c.get_ref('steps') * 2\n    return c\n"
    )
    assert parse(path).config.optimizer.steps == reference.steps * 2


@pytest.mark.parametrize(
    "source, parts",
    [
        ("def get_config():\n    return {'stpes': 1}\n", ["small.py: config.stpes", "Did you mean steps"]),
        ("def get_config():\n    return {'steps': '1'}\n", ["small.py: config.steps='1'", "wanted int"]),
        (
            "def get_config():\n    return {'optimizer': {'kind': 'Adam', 'beta': 1}}\n",
            ["config.optimizer.beta", "betas"],
        ),
        ("def get_config():\n    return None\n", ["returned a NoneType", "ConfigDict"]),
        ("def get_confg():\n    return {}\n", ["defines no get_config()"]),
        ("def get_config(:\n", ["small.py:1", "invalid syntax"]),
        ("def get_config():\n\n    return {}['x']\n", ["small.py:3", "KeyError: 'x'"]),
    ],
)
def test_a_wrong_file_is_an_error_that_names_file_and_place(file, source, parts):
    file.write_text(source)
    message = refused(file)
    for part in parts:
        assert part in message


def test_a_missing_file_is_an_error_that_names_its_neighbours(file):
    message = refused(file.with_name("smal.py"))
    assert "no such file" in message and str(file) in message
    assert "holds no config.json" in refused(file.parent)
    assert "not a JSON file" in refused(configs.atomic_write(file.with_name("a.json"), "{"))


def test_config_and_workdir_are_asked_for():
    with pytest.raises(configs.ConfigError, match="--config is missing"):
        configs.parse(Config, ["--workdir=x"])
    with pytest.raises(configs.ConfigError, match="--config needs a value"):
        configs.parse(Config, ["--config"])
    with pytest.raises(configs.ConfigError, match=r"--confg is not a flag of .*config"):
        configs.parse(Config, ["--confg=a.py", "--workdir", "-x"])
    with pytest.raises(configs.ConfigError, match="--config is missing"):
        configs.parse(Config, ["--config.steps", "3", "--workdir", "x"])


def test_a_workdir_that_is_a_file_is_refused(file, tmp_path):
    (tmp_path / "taken").write_text("")
    for workdir in (tmp_path / "taken", tmp_path / "taken" / "run"):
        with pytest.raises(configs.ConfigError, match=r"--workdir=.*taken is a file"):
            configs.parse(Config, [f"--config={file}", f"--workdir={workdir}"])


def test_a_stage_may_do_without_workdir_and_have_a_default_config(file):
    with pytest.raises(configs.ConfigError, match="--workdir is missing"):
        configs.parse(Config, [f"--config={file}"])
    parsed = configs.parse(Config, [], default_config=str(file), workdir_required=False)
    assert parsed.config.steps == 9 and parsed.workdir is None


def test_flags_of_a_stage_are_typed_and_have_defaults(file):
    flags = {
        "stop_after": configs.Flag(str, None, "last stage"),
        "port": configs.Flag(int, 80, "where to listen"),
    }
    assert parse(file, "--port=81", flags=flags).flags == {"stop_after": None, "port": 81}
    assert "--port=x" in refused(file, "--port=x", flags=flags)


def test_docs_of_fields_come_from_metadata_comments_and_strings():
    docs = field_docs(Config)
    assert docs["steps"] == "how long to train"
    assert docs["clip"] == "Largest global norm of the gradient."
    assert docs["note"] == "Anything worth remembering."
    assert field_docs(Adam) == {"peak_lr": "the highest learning rate"}


def test_help_shows_every_key_with_type_value_and_meaning(file, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(
            file,
            "--help",
            description="Trains a model.",
            flags={"port": configs.Flag(int, 80, "where to listen")},
        )
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith("Trains a model.") and "--port=int  where to listen (default 80)" in text
    assert "--config.steps  int = 9\n      how long to train" in text  # the file's value, not the default
    assert "--config.optimizer.kind  'Adam' | 'Muon' = \"Muon\"" in text
    assert "--config.clip  float | None = null\n      Largest global norm of the gradient." in text
    for field in dataclasses.fields(Config):
        assert f"--config.{field.name}" in text


def test_help_needs_no_config_and_marks_what_is_required(capsys):
    with pytest.raises(SystemExit):
        configs.parse(Needy, ["--help"], "Needs something.")
    assert "--config.init_from  str (required)" in capsys.readouterr().out


def test_run_turns_mistakes_into_a_paragraph_and_exit_code_2(file, capsys):
    def main(config, workdir):
        raise {
            1: configs.ConfigError("mend it"),
            2: FileNotFoundError(2, "gone", "/no/where"),
            3: KeyboardInterrupt(),
            4: OSError(errno.EROFS, "Read-only file system", "/ro/x"),
            5: OSError(errno.ENOSPC, "No space left on device"),
        }[config.steps]

    arguments = [f"--config={file}", "--workdir=x"]
    for steps, code, message in [
        (1, 2, "error: mend it"),
        (2, 2, "/no/where"),
        (3, 130, "same command"),
        (4, 2, "error: /ro/x: Read-only file system. Give a --workdir"),
        (5, 2, "error: No space left on device. Free some space"),
    ]:
        assert configs.run(main, Config, [*arguments, f"--config.steps={steps}"]) == code
        assert message in capsys.readouterr().err
    assert configs.run(lambda config, workdir: 7, Config, arguments) == 7
    assert configs.run(lambda config, workdir: None, Config, arguments) == 0


def test_run_keeps_the_trace_of_a_defect(file):
    def main(config, workdir):
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        configs.run(main, Config, [f"--config={file}", "--workdir=x"])


def test_help_whose_reader_leaves_ends_without_a_trace():
    script = (
        "import sys, configs\nfrom train.config import TrainConfig\nconfigs.parse(TrainConfig, ['--help'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)
    process.stderr.close()


def test_a_process_prints_one_paragraph_and_no_trace_for_a_misspelt_key(file):
    script = textwrap.dedent("""
        import dataclasses, sys, configs
        @dataclasses.dataclass(frozen=True)
        class Config:
            steps: int = 1
            optimizer: dict[str, float] = dataclasses.field(default_factory=dict)
        def main(config, workdir):
            print(config.steps, workdir)
        sys.exit(configs.run(main, Config, description="d"))
    """)
    file.write_text("def get_config():\n    return {}\n")

    def call(*arguments):
        command = [sys.executable, "-c", script, f"--config={file}", "--workdir=w", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    wrong = call("--config.stps=3")
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.strip().count("\n") == 0 and "Did you mean --config.steps?" in wrong.stderr
    right = call("--config.steps=3")
    assert (right.returncode, right.stdout, right.stderr) == (0, "3 w\n", "")


def test_a_config_is_json_that_other_programs_can_read(file, tmp_path):
    saved = configs.save(parse(file).config, tmp_path / "c.json")
    assert json.loads(saved.read_text())["optimizer"] == {"kind": "Muon", "peak_lr": 0.02, "steps": 7}
