"""The command line: what it lists, what it refuses, and what it says when something is not installed."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vig_ref import cli

RECORDS = Path(__file__).parents[1] / "docs" / "results"


def python(*arguments, block=()):
    """A new Python in which the modules `block` cannot be imported."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in block)
    program = f"import sys; {blocked}{arguments[-1]}"
    return subprocess.run([sys.executable, *arguments[:-1], "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in text
        assert command.help in text


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"vig-ref {project['version']}\n"


def test_help_of_a_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: vig-ref demo")
    assert "--device {cpu,cuda}" in text


@pytest.mark.parametrize(("arguments", "message"), [
    (["paint"], "invalid choice: 'paint' (choose from "),
    (["demo", "--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
    (["demo", "--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
    (["init", "--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
    (["init", "--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'"),
    (["init", "--seeds", "-1"], "argument --seeds: expected a whole number of at least 1, got '-1'"),
])  # fmt: skip
def test_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_python_m_vig_ref_is_the_same_command():
    for arguments in (["--help"], []):
        command = [sys.executable, "-m", "vig_ref", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: vig-ref ")


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra_is_named(module):
    done = python("from vig_ref.cli import main; main(['demo'])", block=[module])
    assert done.returncode == 1
    assert f"vig-ref demo: the module '{module}" in done.stderr
    assert "pip install 'vig_ref[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_the_package_is_not_called_a_missing_extra(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "broken", cli.Command("vig_ref.no_such_module", "demo", ""))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main(["broken"])


def test_the_exit_code_is_the_commands(monkeypatch):
    from vig_ref import demo

    monkeypatch.setattr(demo, "run", lambda options: 7 if options.epochs == 3 else 0)
    assert cli.main(["demo", "--epochs", "3"]) == 7


USE_CHUNKED_THEN_FUSED = """
import torch, vig_ref
q, k, v, g_fwd, g_rev = torch.zeros(5, 1, 1, 3, 2).unbind()
for backend in ("naive", "chunked", "auto"):
    vig_ref.bidirectional_gla(q, k, v, g_fwd, g_rev, backend=backend)
print("without Triton")
vig_ref.bidirectional_gla(q, k, v, g_fwd, g_rev, backend="fused")
"""


def test_without_triton_the_package_works_and_fused_says_so():
    done = python(USE_CHUNKED_THEN_FUSED, block=["triton"])
    assert done.stdout == "without Triton\n"
    assert done.returncode == 1
    assert "ImportError: backend 'fused' needs Triton, which is published for Linux only" in done.stderr
    assert "choose backend='chunked' or 'naive'" in done.stderr


def test_without_triton_other_layers_bytes_are_counted():
    done = python("from vig_ref import cli; cli.main(['bench', 'traffic'])", block=["triton"])
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:5]] == ["naive", "chunked", "floor"]
    last = "The fused layer is not counted: that needs Triton, which is published for Linux only."
    assert done.stdout.splitlines()[-1] == last


def test_without_triton_a_record_is_reported():
    """All but the bytes that the fused layer's launcher would make its kernels ask for."""
    report = f"cli.main(['bench', 'ops', '--report', {str(RECORDS / 'h200-ops.json')!r}])"
    done = python(f"from vig_ref import cli; {report}", block=["triton"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| needs Triton |") == 2 * 6  # passes, shapes


def test_importing_the_package_imports_no_optional_module():
    optional = ["triton", "sklearn", "matplotlib"]  # torch itself imports tqdm where it is installed
    done = python(f"import vig_ref; print([m for m in {optional} if m in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


#: Commands, and the work that each must not begin.
WORK = {
    "demo": "demo.agreement.compare_all", "init": "initialisation.measure", "see attention": "see.photograph",
    "see erf": "see.photograph", "verify": "verify.verify", "tables": "tables.measure", "bench ops": "bench.bench",
    "bench limits": "bench_limits.measured", "bench models": "bench_models.import_timm",
}  # fmt: skip
RECORDING = ["verify", "bench ops", "bench limits", "bench models"]


def refused(command, arguments, monkeypatch):
    """What a command says when it ends without having begun its work."""
    module, *rest = WORK[command].split(".")
    owner = importlib.import_module(f"vig_ref.{module}")
    for name in rest[:-1]:
        owner = getattr(owner, name)
    monkeypatch.setattr(owner, rest[-1], None)
    monkeypatch.setattr("vig_ref.bench.why_not", lambda *_: None)  # else `bench limits` refuses a CPU first
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), *arguments])
    return str(stop.value)


@pytest.mark.parametrize("command", WORK)
def test_a_file_in_the_place_of_the_folder_is_refused_before_the_work(command, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("kept")
    name = command if command.startswith("bench") else command.split()[0]
    for out, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory")):
        expected = f"--out: expected a folder that can be written to, got {out} ({reason}); give another path"
        assert refused(command, ["--out", str(out)], monkeypatch) == f"vig-ref {name}: {expected}"
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", RECORDING)
def test_a_record_that_cannot_be_written_is_refused_before_the_work(command, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("kept")
    file = tmp_path / "file"
    says = refused(command, ["--out", str(tmp_path / "out"), "--record", str(file / "record.json")], monkeypatch)
    expected = f"--record: expected a folder that can be written to, got {file} (File exists); give another path"
    assert says == f"vig-ref {command}: {expected}"
    says = refused(command, ["--out", str(tmp_path / "out"), "--record", str(tmp_path)], monkeypatch)
    expected = f"--record: expected a file, got the folder {tmp_path}; give the name of a file"
    assert says == f"vig-ref {command}: {expected}"


def test_a_folder_that_nobody_can_write_to_is_refused(monkeypatch):
    says = refused("demo", ["--out", "/proc"], monkeypatch)
    assert says.startswith("vig-ref demo: --out: expected a folder that can be written to, got /proc (")


@pytest.mark.parametrize("command", RECORDING)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read (No such file or directory)"), ("no JSON", "is no JSON"),
        ("[1]", "is of the command None"), ('{"command": "vig-ref benches"}', "is of the command 'vig-ref benches'"),
        ('{"command": "COMMAND --device cpu"}', "has no KEY"),
    ],
)  # fmt: skip
def test_a_report_of_something_else_is_refused(command, content, reason, tmp_path):
    path = tmp_path / "record.json"
    if content:
        path.write_text(content.replace("COMMAND", f"vig-ref {command}"))
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--report", str(path)])
    reason = reason.replace("KEY", "'errors'" if command == "verify" else "'rows'")
    expected = f"--report: expected a file that vig-ref {command} --record FILE wrote"
    assert str(stop.value) == f"vig-ref {command}: {expected}, got {path}, which {reason}; give such a file"


@pytest.mark.parametrize("one", RECORDING)
def test_a_record_is_printed_by_its_own_command_alone(one, capsys):
    names = ("errors-cpu", "h200-ops", "h200-limits", "h200-models")
    for other, name in zip(RECORDING, names, strict=True):
        report = [*one.split(), "--report", str(RECORDS / f"{name}.json")]
        if other == one:
            assert cli.main(report) == 0
        else:
            with pytest.raises(SystemExit, match=f"which is of the command 'vig-ref {other} "):
                cli.main(report)
