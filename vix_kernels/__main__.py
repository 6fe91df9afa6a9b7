"""Entry point of the commands `vix` and `python -m vix_kernels`."""

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
  linearize       convert the softmax attention of a trained model to linear attention
  validate        evaluate a trained model on held-out images
  predict         classify images with a trained model
  export          export a trained model to an ONNX file
  models          list the models with their sizes and costs
  convert         convert the weights of an original Vision Xformers model to safetensors
  check           show which backend each op uses on this machine, and why
  bench           benchmark the ops against peer packages, or the models; writes tables and plots
  dev             tools for kernel developers

Run vix COMMAND --help for the options and examples of a command.
"""
DEV_COMMANDS = """\
commands:
  compile-report  compile every kernel for several GPU architectures and analyze the code; no GPU needed
  traffic         count the bytes that the kernels read and write, and compare them with the minimum; no GPU needed
  host-time       measure the time per call in Python, PyTorch and Triton's launcher before a kernel starts; no GPU needed
  roofline        predict the time of every op on several GPUs, and list measured times if there are any; no GPU needed
  tune            search for better launch configurations on this GPU

Run vix dev COMMAND --help for the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    commands = {
        "train": _command("training.commands", "train_command"),
        "linearize": _command("linearize.command", "linearize_command"),
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
    parser.add_argument(
        "--import", metavar="MODULE", help="import this module first, for example to register attention methods"
    )
    parser.add_argument("command", nargs=argparse.PARSER, choices=commands)  # the command and its arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may contain undecodable bytes
    args = parser.parse_args(argv)
    name, *arguments = args.command
    if module := getattr(args, "import"):
        sys.path.insert(0, "")  # search the current directory, as `python -m` does
        try:
            import_module(module)
        except ImportError as error:
            parser.error(f"--import: cannot import {module}: {error}")
    try:
        status = commands[name](arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe, as in `vix models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the flush at exit fails again
        return 1
    return status


def _dev(argv: list[str]) -> int:
    names = "compile-report", "traffic", "host-time", "roofline", "tune"
    commands = {name: _measurement(f"dev {name}", name.replace("-", "_")) for name in names}
    parser = Parser(prog="vix dev", epilog=DEV_COMMANDS)
    parser.add_argument("command", nargs=argparse.PARSER, choices=commands)
    name, *arguments = parser.parse_args(argv).command
    if name == "traffic" or (name == "tune" and "--dry-run" in arguments):
        os.environ["TRITON_INTERPRET"] = "1"  # must be set before triton is first imported
    return commands[name](arguments)


def _command(module: str, name: str) -> Callable[[list[str]], int]:
    """Return a function that imports `module` and calls its function `name`. The late import keeps `vix --help` fast."""
    return lambda argv: getattr(import_module(f"vix_kernels.{module}"), name)(argv)


def _measurement(command: str, module: str) -> Callable[[list[str]], int]:
    """Return a function that runs `main` of a module in measure/, or exits with a one-line error if a package is missing."""

    def run(argv: list[str]) -> int:
        try:
            return _command(f"measure.{module}", "main")(argv)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "vix_kernels":
                raise
            Parser(prog=f"vix {command}").error(f"this command needs {error.name}, which is not installed")

    return run


if __name__ == "__main__":
    sys.exit(main())
