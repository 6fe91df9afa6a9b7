"""The command line: `vix`, also `python -m vix_kernels`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from vix_kernels import __version__
from vix_kernels.commands import Parser

COMMANDS = """\
commands:
  train           train a model
  validate        test a trained model on held-out images
  predict         say what is on images
  export          write a trained model to an ONNX file
  models          list the models, with their sizes and costs
  convert         turn the weights of an original Vision Xformers model into safetensors
  check           say which backend each op gets here, and every reason why not another
  bench           measure every op beside its peers, or the models, with tables and pictures
  dev             tools for those who write kernels

vix COMMAND --help says more.
"""
DEV_COMMANDS = """\
commands:
  compile-report  compile every kernel for GPUs that are not there, and weigh the code
  traffic         count the bytes that the kernels move, over the least that they could
  roofline        predict the time of every op on GPUs that are not there, beside what was measured
  tune            look for better launch configurations on this GPU

vix dev COMMAND --help says more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    commands = {
        "train": _command("training.commands", "train_command"),
        "validate": _command("training.commands", "validate_command"),
        "predict": _command("training.commands", "predict_command"),
        "export": _command("training.commands", "export_command"),
        "models": _command("models.commands", "models"),
        "convert": _command("models.commands", "convert"),
        "check": _measurement("check", "check"),
        "bench": _measurement("bench", "sweep"),
        "dev": _dev,
    }
    parser = Parser(prog="vix", epilog=COMMANDS)
    parser.add_argument("--version", action="version", version=f"vix_kernels {__version__}")
    parser.add_argument("--import", metavar="MODULE", help="first import this module, which registers attentions of its own")
    parser.add_argument("command", choices=commands)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    args = parser.parse_args(argv)
    if module := getattr(args, "import"):
        sys.path.insert(0, "")  # from here, as `python -m` would find it
        try:
            import_module(module)
        except ImportError as error:
            parser.error(f"--import: cannot import {module}: {error}")
    try:
        status = commands[args.command](args.arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `vix models | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more on its way out
        return 1
    return status


def _dev(argv: list[str]) -> int:
    commands = {
        name: _measurement(f"dev {name}", name.replace("-", "_")) for name in ("compile-report", "traffic", "roofline", "tune")
    }
    parser = Parser(prog="vix dev", epilog=DEV_COMMANDS)
    parser.add_argument("command", choices=commands)
    name = parser.parse_args(argv[:1]).command
    if name == "traffic" or (name == "tune" and "--dry-run" in argv):
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    return commands[name](argv[1:])


def _command(module: str, name: str) -> Callable[[list[str]], int]:
    """The function `name` of `module`, which is imported when it is called: `vix --help` waits for none of them."""
    return lambda argv: getattr(import_module(f"vix_kernels.{module}"), name)(argv)


def _measurement(command: str, module: str) -> Callable[[list[str]], int]:
    """The `main` of a module in measure/; a package that it lacks is named in one line."""

    def run(argv: list[str]) -> int:
        try:
            return _command(f"measure.{module}", "main")(argv)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "vix_kernels":
                raise
            Parser(prog=f"vix {command}").error(f"it needs {error.name}, which is not installed")

    return run


if __name__ == "__main__":
    sys.exit(main())
