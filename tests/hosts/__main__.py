"""Run the test suites of host libraries on the models of vix_kernels and on models with replaced attention: `make hosts`.

    python -m tests.hosts                              # timm's model tests, from its source distribution
    python -m tests.hosts --transformers PATH          # also those of transformers, from a checkout
    python -m tests.hosts --only timm-models -- -k fx  # one suite, with arguments for pytest

A suite that tests models of the host library runs twice: with attention from this library, and without it. A failure with
this library is accepted if the test also fails without it, or if suites.py lists the test with a reason. The command prints all
other failures, and the entries of suites.py whose tests now pass. The exit code is 1 if the command prints any of these, or if
a suite runs no test. The source distribution of timm and the results are written to build/hosts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from .suites import SUITES, Suite

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "hosts"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make hosts", description=__doc__.partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transformers", type=Path, metavar="PATH", help="a checkout of transformers, for its tests")
    parser.add_argument("--diffusers", type=Path, metavar="PATH", help="a checkout of diffusers, for its tests")
    parser.add_argument("--only", nargs="+", choices=SUITES, metavar="SUITE", help=f"run only these: {', '.join(SUITES)}")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --, such as -k fx")
    options = parser.parse_args()
    problems = 0
    for name, suite in SUITES.items():
        if options.only and name not in options.only:
            continue
        folder = source(suite.package) if suite.package == "timm" else getattr(options, suite.package)
        if folder is None:
            print(f"{name}: skipped, because --{suite.package} is not given", flush=True)
            continue
        problems += run(name, suite, folder, options.pytest)
    return min(problems, 1)


def source(package: str) -> Path:
    """Return the folder of the source distribution of the installed `package`. Download it if necessary."""
    name = f"{package}-{version(package)}"
    if not (BUILD / name).is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package]
        subprocess.run([*command, name.replace("-", "=="), "--dest", BUILD], check=True)
        with tarfile.open(BUILD / f"{name}.tar.gz") as archive:
            archive.extractall(BUILD, filter="data")
    return BUILD / name


def run(name: str, suite: Suite, folder: Path, arguments: list[str]) -> int:
    """Run a suite, print a summary and all problems, and return the number of problems."""
    failed, passed = outcomes(name, suite, folder, suite.settings, arguments)
    before = outcomes(f"{name}-before", suite, folder, suite.before, arguments)[0] if suite.before is not None else set()
    excused = {test: expected for test in failed for expected in suite.expected if expected.covers(test)}
    unexpected = sorted(failed - before - excused.keys())
    outdated = [each for each in suite.expected if any(map(each.covers, passed)) and not any(map(each.covers, failed))]
    also, allowed = len(failed & before), len(excused.keys() - before)
    print(f"{name}: {len(passed)} passed, {len(failed)} failed; {also} also fail without this library, {allowed} are expected")
    for kind in dict.fromkeys(each.kind for each in excused.values()):
        print(f"  {sum(each.kind == kind for each in excused.values())} expected: {kind}")
    for test in unexpected:
        print(f"  FAILED {test}")
    for each in outdated:
        print(f"  passes, although suites.py expects it to fail: {each.pattern}")
    if not passed | failed:
        print("  no test was run")
    return len(unexpected) + len(outdated) + (not passed | failed)


def outcomes(
    name: str, suite: Suite, folder: Path, settings: dict[str, str], arguments: list[str]
) -> tuple[set[str], set[str]]:
    """Run pytest, and return the names of the failed tests and of the passed tests."""
    report = BUILD / f"{name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "hosts", folder, os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", suite.plugin, "-p", "no:cacheprovider", "--import-mode=importlib", "-q"]
    with (BUILD / f"{name}.log").open("w") as log:
        result = subprocess.run(
            [*command, "-W", "ignore", "--tb=short", f"--junitxml={report}", *suite.files, *arguments],
            cwd=folder, env=os.environ | environment | settings, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if result.returncode not in (0, 1) or not report.is_file():  # 1: tests failed
        raise SystemExit(f"{name}: pytest could not run the tests (exit code {result.returncode}); see {BUILD / name}.log")
    failed, passed = set(), set()
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(test)
        elif case.find("skipped") is None:
            passed.add(test)
    return failed, passed


if __name__ == "__main__":
    sys.exit(main())
