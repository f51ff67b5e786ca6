"""The command line that every paper package has: `python -m <package>.<verb>` and `<package> <verb>`.

Heavy modules are imported inside the verbs, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from onestage.cli.flags import VERBS, Call, parse
from onestage.errors import MachineError, UsageError, UserError
from onestage.machine import peak_memory
from onestage.method import Method

INTERRUPTED = 130  # 128 + SIGINT


def entry(method: Method) -> tuple[Callable[[], NoReturn], Callable[[str], NoReturn]]:
    """What a package's `__main__` offers: its command, and a function that runs the verb it is given.

    Both read the process's command line and leave with the exit code.
    """

    def command() -> NoReturn:
        sys.exit(main(method))

    def run_verb(verb: str) -> NoReturn:
        sys.exit(main(method, verb))

    return command, run_verb


def main(method: Method, verb: str | None = None, argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code.

    0 done, 2 usage, 3 data set, 4 weights, 5 machine, 6 a check failed, 130 or 143 interrupted; an error nobody
    expected travels on and so ends the process with 1 and its traceback.

    Args:
        method: The paper package.
        verb: Name of the verb; None takes it from the first word of `argv`.
        argv: The command line without the program's name; None takes the process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    set_up_log(words, method.name)
    return guard(words, lambda: _answer(method, verb, words))


def guard(words: Sequence[str], run: Callable[[], int]) -> int:
    """Runs a command; what its user can mend becomes two lines on stderr and an exit code.

    Args:
        words: Its command line: `-v` shows the traceback too, `--json` puts the error on stdout.
        run: The command.
    """
    try:
        return run()
    except UserError as error:
        return _report(error, words)
    except KeyboardInterrupt as stopped:
        print("interrupted", file=sys.stderr)
        return getattr(stopped, "exit_code", INTERRUPTED)
    except BrokenPipeError:  # the reader of stdout, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UserError.exit_code
    except (OSError, RuntimeError, MemoryError) as error:
        known = _machine_error(error)
        if known is None:
            raise
        return _report(known, words)


def _answer(method: Method, verb: str | None, words: list[str]) -> int:
    if verb is None:
        if not words or words[0] in ("-h", "--help", "help"):
            print(_overview(method))
            return 0 if words else UsageError.exit_code
        if words[0] == "--version":
            print(_version(method))
            return 0
        verb = words.pop(0)
    if words[:1] == ["--version"]:
        print(_version(method))
        return 0
    if verb in method.extra_verbs:
        return method.extra_verbs[verb](words)
    return _run(method, verb, words)


def _run(method: Method, verb: str, words: list[str]) -> int:
    if verb not in VERBS:
        near = get_close_matches(verb, [*VERBS, *method.extra_verbs], n=1)
        raise UsageError(
            f"unknown verb '{verb}'" + (f"; nearest: '{near[0]}'" if near else ""),
            f"use one of: {', '.join([*VERBS, *method.extra_verbs])}",
        )
    call = parse(method, verb, words)
    if getattr(call.flags, "print_config", False):
        print(json.dumps(config_record(method, call), indent=2))
        return 0
    # The import is here because these modules load torch.
    run: Callable[[Method, Call], dict[str, Any]] = import_module(f"onestage.cli.{verb}").run
    result = run(method, call)
    if call.flags.json and os.environ.get("RANK", "0") == "0":  # of torchrun's processes one speaks
        print(json.dumps(result))
    return 0


def config_record(method: Method, call: Call) -> dict[str, Any]:
    """What a run's config.json holds: `--config` reads it back."""
    return {
        "package": method.name,
        "version": import_module(method.name).__version__,
        "verb": call.verb,
        "variant": getattr(call.flags, "variant", method.demo_variant if call.verb == "demo" else None),
        "flags": call.settings(),
        "model": None if call.config is None else asdict(call.config),
    }


def _overview(method: Method) -> str:
    lines = [f"{method.title}", "", f"usage: python -m {method.name} VERB [FLAGS]", ""]
    for name, verb in {**VERBS, **method.extra_verbs}.items():
        lines.append(f"  {name:12} {(verb.__doc__ or '').strip().partition(chr(10))[0]}")
    return "\n".join([*lines, "", f"Flags of a verb: python -m {method.name}.train --help"])


def _version(method: Method) -> str:
    core = import_module("onestage").__version__
    return f"{method.name} {import_module(method.name).__version__} (onestage {core})"


def set_up_log(words: Sequence[str], package: str) -> None:
    """Messages for people go to stderr; a run folder adds its log.txt.

    Args:
        words: The command line: `-v` says more, `-q` less.
        package: Whose messages are shown besides the core's.
    """
    for name in ("onestage", package):
        logging.getLogger(name).setLevel(logging.DEBUG if {"-v", "--verbose"} & {*words} else logging.INFO)
    logger = logging.getLogger("onestage")
    for handler in [h for h in logger.handlers if isinstance(h, _Stderr)]:
        logger.removeHandler(handler)
    handler = _Stderr()
    if {"-q", "--quiet"} & {*words}:
        handler.setLevel(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False


class _Stderr(logging.Handler):
    """Plain lines on stderr that do not break a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        text = f"warning: {text}" if record.levelno == logging.WARNING else text
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)


def _report(error: UserError, words: Sequence[str]) -> int:
    if {"-v", "--verbose"} & {*words}:
        import traceback

        traceback.print_exception(error)
    print(f"error: {error.what}\n  fix: {error.fix}", file=sys.stderr)
    if "--json" in words:
        print(json.dumps({"error": error.what, "fix": error.fix, "exit_code": error.exit_code}))
    return error.exit_code


def _machine_error(error: Exception) -> UserError | None:
    """What an error of the machine means for its user; None for one that nobody expects."""
    text = str(error)
    if isinstance(error, OSError):
        name = f"'{error.filename}'" if error.filename else "a file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return MachineError(
                f"no space left to write {name}", "free some space, or choose another disk with --output"
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return MachineError(f"{name} cannot be opened: {error.strerror}", "change its permissions, or name another")
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return UsageError(f"{name} cannot be opened: {error.strerror}", "name another path")
        return None
    if "operator torchvision::nms does not exist" in text:
        from importlib.metadata import version

        return MachineError(
            f"torch {version('torch')} and torchvision {version('torchvision')} were built for different devices"
            " (operator torchvision::nms does not exist)",
            "install both from the same index, for example: pip install --force-reinstall torch torchvision",
        )
    if type(error).__name__ == "DistBackendError" or "gloo/transport" in text:
        return MachineError(
            "another process of this run has ended and took this one along",
            "see what it said; the run goes on from its last checkpoint with --resume",
        )
    if text.startswith("DataLoader worker (pid"):
        return MachineError(
            "a process that reads images has ended before its work was done",
            "memory ran out, if nobody killed it: use fewer --workers",
        )
    if "not implemented for 'Half'" in text or "does not support bfloat16" in text:
        return MachineError(
            f"this device cannot compute in the --precision asked for: {text.splitlines()[0]}",
            "use another --precision: fp32 runs anywhere, fp16 on every GPU, bf16 on new ones",
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or type(error).__name__ == "OutOfMemoryError":
        return MachineError(
            f"out of memory{_memory()}: {text.splitlines()[0] if text else 'the process needs more than there is'}",
            "use a smaller --batch-size (with --accumulate), a smaller --size, or --precision bf16",
        )
    return None


def _memory() -> str:
    """Memory now and at its peak, GiB."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return f" (GPU: {now / 2**30:.1f} GiB now, {peak / 2**30:.1f} GiB at the peak)"
    peak = peak_memory()
    return "" if math.isnan(peak) else f" (process: {peak / 2**30:.1f} GiB at the peak)"
