"""Helper functions for the integrations: check library versions, replace attention modules, and undo replacements.

A host library defines the models whose attention is replaced.
"""

from __future__ import annotations

import copyreg
import dataclasses
import fnmatch
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from torch import nn

from .. import backends
from ..nn.core import Site
from .drop_in import DropIn
from .report import Report

ROOT = "(the model itself)"  # the model's name in reports if the model is an attention module
ENTRY = "vix_attention"  # entry of a transformers configuration that describes the model's attention


def require(package: str, oldest: str) -> None:
    """Raise ImportError if `package` is not installed or is older than version `oldest`."""
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"this integration needs {package} {oldest} or newer: pip install {package}") from None
    if _numbers(found) < _numbers(oldest):
        raise ImportError(f"{package}: expected version {oldest} or newer, got {found}: pip install --upgrade {package}")


@contextmanager
def host(package: str, oldest: str) -> Iterator[None]:
    """Context manager for imports from a host library. It adds the installed version to import errors.

    Raises:
        ImportError: the library is not installed, is older than `oldest`, or lacks an imported name.
    """
    require(package, oldest)
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{package} {version(package)}: cannot import a name that vix_kernels needs; it may have moved: {error}"
        ) from error


def require_call(package: str, kind: type[nn.Module], host: type[nn.Module], ignored: Sequence[str] = ()) -> None:
    """Raise ImportError unless `kind.forward`, the replacement, accepts every argument of `host.forward`.

    `ignored` lists arguments that `host` accepts but does not use.
    """
    supported, host_arguments = (list(inspect.signature(each.forward).parameters)[1:] for each in (kind, host))
    if not set(host_arguments) <= {*supported, *ignored}:
        raise ImportError(
            f"{package} {version(package)}: vix_kernels does not support this version: {host.__name__} is called with "
            f"({', '.join(host_arguments)}), expected ({', '.join(supported)})"
        )


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def replace_each(
    model: nn.Module,
    attention: DropIn,
    *,
    reason_against: Callable[[nn.Module], str],
    adapt: Callable[[nn.Module], None],
    expected: str,
    layers: Sequence[str] | None = None,
    site_of: Callable[[nn.Module], Site] = lambda module: Site(module.head_dim, module.num_heads),
    place: Callable[[str, DropIn], None] = lambda name, attention: None,
) -> Report:
    """Replace the attention of every supported attention module in `model`.

    Add a copy of `attention` to each module, as the child module `vix`. If an error occurs, undo all replacements.

    Args:
        model: the host model.
        attention: the new attention.
        reason_against: a function that returns why a module cannot be replaced, or an empty string if it can be replaced.
        adapt: a function that makes a module use its child module `vix`.
        expected: the expected kind of model or layer, for the error message.
        layers: names or patterns, such as "blocks.1*", of the modules to replace. None: all. Modules that match
            no name or pattern are not listed in the report.
        site_of: a function that returns the Site of a module, including the number and width of its heads.
        place: a function that receives the name of a module and the module's copy of `attention`. It sets the number of prefix
            tokens and the grid of the copy.

    Returns:
        a report that lists the replaced layers, and states why the remaining selected layers could not be replaced.

    Raises:
        ValueError: nothing could be replaced, or a pattern matches no attention layer.
    """
    report, chosen = Report(repr(attention), model=model), []
    for name, module in selected(attentions(model), layers):
        if reason := reason_against(module):
            report.refused[name] = reason
            continue
        each = attention.mounted(dataclasses.replace(site_of(module), layer=len(chosen))).like(module)
        before = getattr(module, "vix", None)
        each.host = before.host if isinstance(before, DropIn) else type(module)
        place(name, each)
        if each.num_tokens is not None:
            report.tokens[name] = each.num_tokens
        chosen.append((module, each))
        report.attentions[name] = each.describe()
    report.checked(expected)
    report.expect(attention, site_of(chosen[0][0]).head_dim, 3)
    snapshot = Snapshot(model)
    try:
        for module, each in chosen:
            module.vix = each
            adapt(module)
    except BaseException:
        snapshot.restore()
        raise
    return report


class Snapshot:
    """A copy of the classes and attributes of a model's modules. The values of tensors are not copied.

    `restore` undoes changes to the modules, such as replacements of their attention.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {
            name: (module, type(module), {key: (value, _copy(value)) for key, value in vars(module).items()})
            for name, module in model.named_modules()
        }
        # The configurations in a transformers model, and the attention that each one selects
        configs = [getattr(module, "config", None) for module in model.modules()]
        self.configs = {
            id(each): (each, each._attn_implementation_internal, vars(each).get(ENTRY))
            for each in configs
            if hasattr(each, "_attn_implementation_internal")
        }

    def restore(self, layers: Sequence[str] | None = None) -> None:
        """Restore all modules, or only the modules named in `layers` and their submodules."""
        everything = layers is None or ROOT in layers
        for name, (module, kind, state) in self.modules.items():
            if everything or any(name == layer or name.startswith(f"{layer}.") for layer in layers):
                module.__class__ = kind
                for value, saved in state.values():
                    if saved is not value:  # keep the dict object, because the handles of hooks refer to it
                        value.clear()
                        value.update(saved)
                before = {key: value for key, (value, _) in state.items()}
                for key in [key for key in vars(module) if key not in before]:
                    del vars(module)[key]
                vars(module).update(before)
        for config, implementation, entry in self.configs.values():
            found = None
            if layers is not None:
                from .transformers_saved import replaced_layers

                found = replaced_layers(self.modules[""][0], config)
            if found is None:
                # Unlike the setter of _attn_implementation, this does not change sub-configurations.
                config._attn_implementation_internal, found = implementation, entry
            vars(config).pop(ENTRY, None)
            vars(config).update({} if found is None else {ENTRY: found})


def _copy(value: Any) -> Any:
    """Copy a dict or an OrderedDict, such as a module's `_parameters` or `_forward_hooks`. Return any other value unchanged.

    Other subclasses of dict are not copied, because `restore` cannot change all of them in place. For example, diffusers'
    configurations are read-only.
    """
    return value.copy() if type(value) in (dict, OrderedDict) else value


def patch_each(
    model: nn.Module,
    classes: Mapping[type[nn.Module], type[nn.Module]],
    *,
    attention: str,
    expected: str,
    reason_against: Callable[[nn.Module], str] = lambda module: "",
) -> Report:
    """Change the class of every module in `model` whose class is a key of `classes`. Modules keep all their attributes.

    The report also lists modules that an earlier call changed. Instances of subclasses, and of other classes with the same
    names, are not changed, because they may compute something else.

    Args:
        model: the host model.
        classes: maps each class of the host library to an equivalent subclass.
        attention: a description of the new attention, for the report.
        expected: the expected kind of model, for the error message.
        reason_against: as in replace_each.

    Returns:
        a report that lists the changed modules, and states why other modules could not be changed.

    Raises:
        ValueError: nothing could be replaced. The model is then unchanged.
    """
    check_model(model)
    report, chosen, names = Report(attention), [], {kind.__name__ for kind in classes}
    for name, module in model.named_modules():
        kind = _HOSTS.get(type(module), type(module))
        if kind not in (*classes, *classes.values()):
            if isinstance(module, tuple(classes)) or kind.__name__ in names:
                hosts = " or ".join(f"{each.__module__}.{each.__name__}" for each in classes)
                report.refused[name or ROOT] = f"{kind.__module__}.{kind.__qualname__}, which is not {hosts}"
        elif reason := reason_against(module):
            report.refused[name or ROOT] = reason
        else:
            chosen.append((module, classes.get(kind, kind)))
            report.attentions[name or ROOT] = kind.__name__
    report.checked(expected)
    for module, kind in chosen:
        module.__class__ = kind
    return report


def patch_package(
    model: nn.Module,
    package: str,
    oldest: str,
    ours: type[nn.Module],
    *,
    backend: str,
    reason_against: Callable[[nn.Module], str],
    ignored: Sequence[str] = (),
) -> Report:
    """Find the class in `package` with the same name as `ours`, and make its instances in `model` run `ours.forward`.

    Args:
        model: a model that contains modules of the package.
        package, oldest: the package and its oldest supported version.
        ours: an equivalent class with the same parameters. Its forward method uses the attributes of the package's class, and
            the class attributes `compat` and `backend`, which this function adds.
        backend: the backend of the new attention.
        reason_against: as in replace_each.
        ignored: arguments that the package's forward method accepts but does not use.

    Returns:
        a report that lists the changed modules, and states why other modules could not be changed.

    Raises:
        ImportError: the package is not installed or not supported, or the import finds a copy other than the installed one.
        ValueError: nothing could be replaced. The model is then unchanged.
    """
    check_model(model)
    backends.check(backend)
    with host(package, oldest):
        kind = getattr(import_module(package.replace("-", "_")), ours.__name__)
    found, installed = Path(inspect.getfile(kind)).resolve(), Path(distribution(package).locate_file("")).resolve()
    if installed not in found.parents:  # projects such as scBERT contain a modified copy of the package
        raise ImportError(f"{package}: expected the package installed in {installed}, got a copy of it, {found}")
    require_call(package, ours, kind, ignored)
    return patch_each(
        model,
        {kind: patched(kind, ours, backend)},
        attention=f"{ours.__name__} of {package}",
        expected=f"{kind.__module__}.{kind.__name__}",
        reason_against=reason_against,
    )


class _Patched(type):
    """Metaclass of the classes that `patched` returns. Pickle recreates these classes instead of importing them."""


_HOSTS: dict[type, type[nn.Module]] = {}  # maps each result of `patched` to the argument `host`


@cache
def patched(host: type[nn.Module], ours: type[nn.Module], backend: str) -> type[nn.Module]:
    """Return a subclass of `host` and `ours` with the forward method of `ours`. For other methods, `host` takes precedence."""
    namespace = {"forward": ours.forward, "compat": True, "backend": backend, "__module__": ours.__module__}
    kind = _Patched(host.__name__, (host, ours), namespace)
    _HOSTS[kind] = host
    return kind


def _reduce(kind: _Patched) -> str | tuple[Callable, tuple]:
    # Subclasses, such as those that FSDP creates for wrapped modules, inherit the metaclass. They are pickled by name.
    return (patched, (*kind.__bases__, kind.backend)) if kind in _HOSTS else kind.__qualname__


copyreg.pickle(_Patched, _reduce)


def unpatch(model: nn.Module) -> list[str]:
    """Undo `patch` in place. The model can be from performer-pytorch, nystrom-attention or linformer.

    Returns:
        the names of the restored modules.

    Raises:
        ValueError: the model was not patched.
    """
    check_model(model)
    found = {name or ROOT: module for name, module in model.named_modules() if type(module) in _HOSTS}
    if not found:
        raise ValueError("model: expected a patched model, got one without patched modules")
    for module in found.values():
        module.__class__ = _HOSTS[type(module)]
    return list(found)


def reason_against_linear(module: nn.Module, *names: str) -> str:
    """Return an error message if a layer named in `names` is not an nn.Linear with bias=False, otherwise an empty string.

    The replacements apply these layers to zeros or to sums of tokens, so a bias or another class would change the results.
    """
    for name in names:
        layer = getattr(module, name)
        if type(layer) is not nn.Linear or layer.bias is not None:
            got = "one with a bias" if type(layer) is nn.Linear else type(layer).__name__
            return f"{name}: expected a torch.nn.Linear without bias, got {got}"
    return ""


def selected(found: Iterable[tuple[str, nn.Module]], layers: Sequence[str] | None) -> list[tuple[str, nn.Module]]:
    """Return the pairs (name, module) in `found` whose name matches a pattern in `layers`. If `layers` is None, return all."""
    found = list(found)
    if layers is None:
        return found
    if not isinstance(layers, list | tuple) or not all(isinstance(pattern, str) for pattern in layers):
        raise TypeError(f"layers: expected a list of names or patterns, got {layers!r}")
    if not layers:
        raise ValueError("layers: expected at least one name or pattern, or None for all layers, got none")
    for pattern in layers:
        if not fnmatch.filter((name for name, _ in found), pattern):
            names = ", ".join(name for name, _ in found[:3]) or "none"
            raise ValueError(f"layers: expected names of attention layers ({names}, ...), got {pattern!r}")
    return [(name, module) for name, module in found if any(fnmatch.fnmatch(name, pattern) for pattern in layers)]


def module_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module whose name in a report is `name`."""
    return model if name == ROOT else model.get_submodule(name)


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) for each attention module in `model`.

    These are the modules whose class name contains Attention or Attn, but not Block, and timm's ParallelScalingBlocks, which
    compute attention without an attention module.
    """
    check_model(model)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if (re.search("Attention|Attn", kind) and "Block" not in kind) or kind.endswith("ParallelScalingBlock"):
            yield name or ROOT, module
