import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import app, flags
from absl.testing import flagsaver

from simgr_jax import cli
from simgr_jax.errors import Stopped, UserError

CONFIG = "from simgr_jax import default_config\ndef get_config(name=''):\n    config = default_config.get_config()\n"
CONFIG += "    config.data.name = name\n    return config\n"
# Without the in-batch loss, SimGR does not read its `log_q`.
LOSSES = ("--config.simgr.in_batch_weight=0.5",)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a `main` as a binary with the flags --config and --workdir; returns the exit code, 0 if it just returns."""
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_silence_libraries", lambda: None)
    monkeypatch.setattr(cli, "_end_at_once", lambda: None)
    app.define_help_flags()

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["binary", *arguments])
        with flagsaver.flagsaver():
            cli.define_config()
            flags.DEFINE_string("workdir", None, "The workdir.")
            try:
                cli.run(main)
            except SystemExit as end:
                return end.code
            return 0

    return run


def parsed(run, *arguments):
    """The config and the workdir that `main` finds."""
    found = SimpleNamespace()

    def main():
        found.config, found.workdir = flags.FLAGS.config, flags.FLAGS.workdir

    assert run(main, *arguments) == 0
    return found


def test_a_placeholder_of_the_config_is_for_the_command_line_to_fill(run, tmp_path):
    placeholder = CONFIG.replace("return", "config.data.path = config_dict.placeholder(str)\n    return")
    (tmp_path / "config.py").write_text(f"from ml_collections import config_dict\n{placeholder}")
    assert parsed(run, "--config=config.py", "--config.data.path=there").config.data.path == "there"


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config=config.py:shop", *LOSSES, "--config.simgr.temperature=0.1", "--noconfig.simgr.log_q", "--workdir=w"),
        (
            *("-config", "config.py:shop", *LOSSES),
            *("--config.simgr.temperature", "0.1", "--config.simgr.log_q=false", "--workdir", "w"),
        ),
        ("--workdir=w", "--config=config.py:shop", *LOSSES, "--config.simgr.temperature=0.1", "--noconfig.simgr.log_q"),
    ],
)
def test_flags_the_config_and_its_overrides_are_read(run, arguments):
    found = parsed(run, *arguments)
    assert found.workdir == "w"
    assert found.config.data.name == "shop"
    assert found.config.simgr.temperature == 0.1
    assert found.config.simgr.log_q is False
    with pytest.raises(AttributeError):
        found.config.new_key = 1


@pytest.mark.parametrize(
    ("override", "value"), [("('a', 'b')", ("a", "b")), ("()", ()), ("a", ("a",)), ("'a','b'", ("a", "b"))]
)
def test_a_tuple_is_overridden(run, override, value):
    found = parsed(run, "--config=config.py", f"--config.semantic_ids.embeddings.names={override}")
    assert found.config.semantic_ids.embeddings.names == value


def test_a_users_mistake_is_one_line_and_exit_code_2(run, capsys):
    assert run(fail(UserError("file:3: is\nwrong; mend it"))) == 2
    assert capsys.readouterr().err == "error: file:3: is wrong; mend it\n"


def test_our_mistake_keeps_its_traceback(run):
    with pytest.raises(ZeroDivisionError):
        run(fail(ZeroDivisionError("ours")))


def test_interruption_is_exit_code_130_without_a_word(run, capsys):
    assert run(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def test_a_run_that_was_asked_to_stop_says_where_and_has_its_own_exit_code(run, capsys):
    assert run(fail(Stopped("stopped after step 3 of 9, which is saved"))) == os.EX_TEMPFAIL == 75
    assert capsys.readouterr().err == (
        "stopped after step 3 of 9, which is saved; give the same command again to continue\n"
    )


# Code that an interrupt reaches where errors are swallowed, as in a library or a garbage collector's callback.
SWALLOWS = """
import os, signal, sys
try:
    os.kill(os.getpid(), signal.{signal})
    for _ in range(1000):
        pass
except BaseException:
    pass
"""


@pytest.mark.parametrize("module", ["jax", "grain"])
def test_an_interrupt_during_imports_ends_a_binary(root, tmp_path, module):
    """Grain is imported late, after Polars, which installs a handler of its own."""
    (tmp_path / f"{module}.py").write_text(SWALLOWS.format(signal="SIGINT") + "os._exit(7)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"}
    ended = subprocess.run([sys.executable, "-m", "simgr_jax.train"], env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "full"])
def test_output_that_can_not_be_printed_is_one_warning_and_the_work_is_done(root, tmp_path, closed):
    """As in `| head -1`, or on a full disk. Rich would end the process by itself, and Python fails once more at its
    end."""
    program = "from rich.console import Console\nfrom simgr_jax import cli\ndef main():\n    print('a', flush=True)\n"
    program += f"    Console().print('b')\n    open({str(tmp_path / 'done')!r}, 'w')\n    print('c')\ncli.run(main)\n"
    reader, pipe = os.pipe()
    os.close(reader)
    with os.fdopen(pipe, "w") if closed else open("/dev/full", "w") as output:
        os.set_inheritable(output.fileno(), True)
        ended = subprocess.run(
            [sys.executable, "-c", program], cwd=root, stdout=output, stderr=subprocess.PIPE, text=True
        )
    reason = "Broken pipe" if closed else "No space left on device"
    assert ended.stderr == (
        f"WARNING:simgr_jax.standard_output:standard output: can't be written ({reason}); what is printed from here on "
        "is lost\n"
    )
    assert ended.returncode == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_outside_the_training_loop_ends_a_binary(root, tmp_path, name):
    """E.g. while data are prepared, or in an evaluation."""
    lines = "\n    ".join(SWALLOWS.format(signal=name).splitlines())
    program = f"from simgr_jax import cli\ndef main():\n    {lines}\n    sys.exit(7)\ncli.run(main)\n"
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-getattr(signal, name), "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config=config.py", "--config.training.epohcs=1"), "config.training.epohcs: the config has no such key"),
        (("--config=config.py", "--config.model.name.x=1"), "config.model.name.x: config.model is a value, not a"),
        (("--config=config.py", "--config.simgr={}"), "config.simgr: is a group of keys; set them one by one, like"),
        (("--config=config.py", "--config=other.py"), "--config=other.py: is a second --config; give one"),
        (("--config=config.py", "more", "words"), "more: is not a flag; flags look like --name=value"),
        (("--config=config.py", "--config.seed"), "Missing value for flag --config.seed"),
        (("--config",), "--config=: there is no such file"),
        (("--config.seed=1", "--config=config.py"), "--config was specified"),
    ],
)  # fmt: skip
def test_bad_flags_never_reach_main(run, arguments, message, capsys):
    assert run(fail(AssertionError("main ran")), *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        (
            *("sasrec", "--config.simgr.temperature=0.1"),
            'config.simgr.temperature: is not read by model "sasrec"; leave it out: the model reads sasrec.*, ',
        ),
        (
            *("sasrec", "--config.semantic_ids.quantizer.levels=3"),
            'config.semantic_ids.quantizer.levels: is not read by model "sasrec"; leave it out: the model reads ',
        ),
        (
            *("simgr", "--noconfig.simgr.log_q"),
            "config.simgr.log_q: is not read without config.simgr.in_batch_weight above 0; set that, too, ",
        ),
        ("popularity", "--config.training.epochs=2", 'config.training.epochs: is not read by model "popularity"; '),
    ],
)
def test_an_override_that_the_model_does_not_read_is_refused(run, model, override, message, capsys):
    assert run(fail(AssertionError("main ran")), "--config=config.py", f"--config.model={model}", override) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(("name", "dataset"), [("quickstart", ""), ("amazon:beauty", "beauty")])
def test_a_config_of_the_package_is_found_by_name_from_any_directory(run, name, dataset):
    """The test runs in a folder that has no configs/."""
    assert parsed(run, f"--config={name}").config.data.name == dataset


def test_a_name_of_a_config_means_it_whatever_lies_in_the_folder(run, tmp_path):
    (tmp_path / "quickstart").write_text("not a config")
    assert parsed(run, "--config=quickstart").config.data.format == "synthetic"


def test_a_flagfile_is_refused(run, tmp_path, capsys):
    (tmp_path / "flags").write_text("--config.simgr.temperature=5")
    assert run(fail(AssertionError("main ran")), "--config=config.py", "--flagfile=flags") == 2
    assert capsys.readouterr().err.startswith("error: --flagfile: is not supported")


def test_an_unknown_config_name_is_refused_with_the_known_ones(run, capsys):
    assert run(fail(AssertionError("main ran")), "--config=quikstart") == 2
    message = (
        "error: --config=quikstart: there is no such file; give its path, or one of amazon, compare, compare_llm, "
    )
    assert capsys.readouterr().err.startswith(message)


def test_help_shows_the_flags(run, capsys):
    assert run(fail(AssertionError("main ran")), "--helpfull") == 1
    assert "--workdir" in capsys.readouterr().out


def test_required_flags():
    with flagsaver.flagsaver():
        flags.DEFINE_string("output", None, "")
        flags.FLAGS(["binary"])
        with pytest.raises(UserError, match="--output: is missing; give --output="):
            cli.required("output")
        flags.FLAGS(["binary", "--output=file"])
        assert cli.required("output") == "file"


def test_a_workdir_is_made_with_its_parents(tmp_path):
    workdir = cli.open_workdir(str(tmp_path / "a" / "b"))
    assert workdir.is_dir()
    assert cli.open_workdir(str(workdir)) == workdir


def test_a_home_directory_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.open_workdir("~/w") == tmp_path / "w"
