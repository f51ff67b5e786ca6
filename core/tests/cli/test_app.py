import errno
import json
from dataclasses import replace

import pytest

from onestage.cli import app
from onestage.cli.flags import VERBS
from onestage.errors import CheckFailed, DatasetError, MachineError, UsageError, UserError, WeightsError


def run_raising(monkeypatch, error, *words):
    """`info` as a verb whose work ends in `error`."""

    def fail(method, call):
        raise error

    monkeypatch.setattr("onestage.cli.info.run", fail)
    return ["info", *words]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a", "b"), 1),
        (UsageError("a", "b"), 2),
        (DatasetError("a", "b"), 3),
        (WeightsError("a", "b"), 4),
        (MachineError("a", "b"), 5),
        (CheckFailed("a", "b"), 6),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "x.ckpt"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 5),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "photo.jpg/run"), 2),
        (MemoryError(), 5),
        (RuntimeError("\"max_pool2d\" not implemented for 'Half'"), 5),
        (RuntimeError("Current CUDA Device does not support bfloat16. Please switch dtype to float16."), 5),
        (RuntimeError("operator torchvision::nms does not exist"), 5),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 5),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:3: Connection reset by peer"), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 5),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(call, monkeypatch, error, code):
    got, out, err = call(*run_raising(monkeypatch, error))
    assert got == code
    assert out == ""
    assert "Traceback" not in err
    if code not in (130,):
        assert err.startswith("error: ")
        assert err.count("\n") == 2
        assert "\n  fix: " in err


def test_memory_that_ran_out_is_told_where_the_system_does_not_count_it(call, monkeypatch):
    monkeypatch.setattr(app, "peak_memory", lambda: float("nan"))
    code, _, err = call(*run_raising(monkeypatch, MemoryError()))
    assert code == 5
    assert err.startswith("error: out of memory: the process needs more than there is\n  fix: ")


def test_an_error_nobody_expected_travels_on(call, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        call(*run_raising(monkeypatch, ZeroDivisionError()))


def test_verbose_shows_where_an_error_came_from(call, monkeypatch):
    _, _, err = call(*run_raising(monkeypatch, DatasetError("a", "b"), "-v"))
    assert "Traceback" in err
    assert err.endswith("error: a\n  fix: b\n")


def test_json_reports_a_failure_too(call, monkeypatch):
    _, out, _ = call(*run_raising(monkeypatch, DatasetError("a", "b"), "--json"))
    assert json.loads(out) == {"error": "a", "fix": "b", "exit_code": 3}


def test_json_is_one_object_on_stdout(call):
    code, out, _ = call("info", "--json")
    assert code == 0
    assert list(json.loads(out)) == ["big", "small", "demo"]


def test_of_several_processes_one_writes_json(call, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call("info", "--json")[1] == ""


def test_without_a_verb_the_overview_lists_all_verbs(call):
    code, out, _ = call(None)
    assert code == 2
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert call(None, "--help")[0] == 0


def test_the_overview_says_what_a_papers_own_verb_does(method):
    def fit(words):
        """Fits what is fitted.

        Twice.
        """

    overview = app._overview(replace(method, extra_verbs={"fit": fit}))
    assert "\n  fit          Fits what is fitted.\n\nFlags" in overview


def test_an_unknown_verb_gets_the_nearest(call):
    code, _, err = call(None, "trian")
    assert code == 2
    assert err.startswith("error: unknown verb 'trian'; nearest: 'train'\n  fix: use one of: demo, train, eval,")


def test_an_unknown_flag_gets_the_nearest(call):
    code, _, err = call("train", "--epoch", "3")
    assert code == 2
    assert err == (
        "error: unknown flag '--epoch'; nearest: '--epochs'\n"
        "  fix: use --epochs, or see: python -m onestage.train --help\n"
    )


def test_version_and_verbs_help_answer(call):
    assert call(None, "--version")[1].startswith("onestage ")
    assert call("train", "--version")[1].startswith("onestage ")
    code, out, _ = call("train", "--help")
    assert code == 0
    assert "--optim.lr FLOAT" in out
    assert "--model.grid INT INT" in out


def test_print_config_prints_what_config_reads_back(call, here):
    _, out, _ = call("train", "--small", "--seed", "5", "--print-config")
    (here / "config.json").write_text(out)
    _, again, _ = call("train", "--config", "config.json", "--print-config")
    assert json.loads(again) == json.loads(out)
    assert json.loads(out)["flags"]["seed"] == 5


def test_a_papers_own_verb_is_called_with_its_words(method):
    seen = []
    own = replace(method, extra_verbs={"fit": lambda words: seen.append(words) or 0})
    assert app.main(own, None, ["fit", "--all", "3"]) == 0
    assert seen == [["--all", "3"]]
