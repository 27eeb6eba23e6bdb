"""Nets that are not of `NETS`, by name:

    torchvision:NAME             any classification model of torchvision, as it is there
    timm:NAME                    any model of timm, an optional extra
    package.module:factory       the user's own, importable
    path/to/file.py:factory      the user's own, in a file anywhere

Nothing is downloaded. Own factories are run where a net is built, unless `code_of_files` says that
what files name is not trusted; nothing else here imports any. They are called by keyword with
`num_classes` and, where their signature has them, `in_channels`, `width` and `image_size`: the side of
a square, or (height, width).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bimask.data.pictures import Size, height_and_width
from bimask.errors import ModelError, SettingError
from bimask.nets.answers import taken, where_logits
from bimask.nets.published import with_in_channels

TORCHVISION, TIMM = "torchvision", "timm"


@dataclass
class _Trust:
    given: bool = True  # who calls this library names a factory in code of their own


_TRUST = _Trust()


@contextmanager
def code_of_files(trusted: bool) -> Iterator[None]:
    """Whether code that is named in a file may run, until the context ends: the one place of that rule.

    `study.launch` trusts the file on its command line; every other command only `--trust-code`. Where
    it is not trusted, an own net can be described, compared and digested, but not built. It holds for
    the whole process, since whatever loads in a thread follows the command.
    """
    before, _TRUST.given = _TRUST.given, trusted
    try:
        yield
    finally:
        _TRUST.given = before


def may_run(name: str) -> bool:
    """Whether the net `name` may be built: it is no code of a file, or such code is trusted."""
    return _TRUST.given or not is_own(name)


def require_trusted(name: str) -> None:
    """Refuse a net that may not be built, see `code_of_files`.

    Raises:
        SettingError: it is code that is not trusted.
    """
    if not may_run(name):
        raise SettingError(
            f"The net {name!r} is code, which may do anything, and nothing of it was run; if you trust "
            "it, allow it with --trust-code."
        )


def is_own(name: str) -> bool:
    """Whether the net is made by code that the name points to, not by a library's list."""
    return ":" in name and _parts(name)[0] not in (TORCHVISION, TIMM)


def _parts(name: str) -> tuple[str, str]:
    """Library, module or file of a net, and what is asked of it; empty where there is none."""
    library, _, model = name.partition(":")
    if library in (TORCHVISION, TIMM):
        return library, model
    place, _, attribute = name.rpartition(":")
    return place, attribute


def require_known(name: str, known: Iterable[str]) -> None:
    """Refuse a name that no net can have, by its form alone; see `bimask.nets.check_net`."""
    place, attribute = _parts(name)
    if not place or not attribute:
        raise SettingError(
            f"Unknown net {name!r}; known are {', '.join(sorted(known))}, torchvision:NAME, timm:NAME, "
            "package.module:factory and path/to/file.py:factory."
        )
    if place == TORCHVISION and attribute not in _torchvision_names():
        raise SettingError(
            f"torchvision has no classification model {attribute!r}; it has "
            f"{', '.join(_torchvision_names())}."
        )
    if not is_own(name):
        return
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise SettingError(f"There is no file {place} to make the net {name!r}; mend its path.")
    elif not re.fullmatch(r"\w+(\.\w+)*", place):
        raise SettingError(
            f"The net {name!r} is neither package.module:factory nor path/to/file.py:factory."
        )


def factory_of(name: str) -> Callable[..., nn.Module]:
    """What makes the net `name`, one that `require_known` lets pass; own code is imported, so run.

    Raises:
        SettingError: no such model or factory, an import that fails, or code that is not trusted.
    """
    place, attribute = _parts(name)
    require_trusted(name)
    if place == TORCHVISION:
        return partial(_from_torchvision, attribute)
    if place == TIMM:
        return partial(_from_timm, attribute)
    try:
        module = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's code raises
        raise _not_imported(name, error) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise SettingError(
            f"{place} has no factory {attribute!r} for the net {name!r}, only "
            f"{', '.join(n for n, v in vars(module).items() if _is_factory(v, module)) or 'none'}."
        )
    return factory


def _is_factory(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _module_of_file(place: str) -> ModuleType:
    """The module in a file, run anew.

    It is not left in sys.modules: a class of a module that other processes cannot import must travel
    to them by value, and cloudpickle decides by that.
    """
    digest = hashlib.sha256(str(Path(place).resolve()).encode()).hexdigest()[:12]
    module_name = f"_bimask_net_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up while it runs
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(module_name, None)
    return module


def source_of(name: str) -> Path:
    """The file of an own factory; nothing is imported to find it.

    Raises:
        SettingError: no such module, or one that is not in a file.
    """
    place, _ = _parts(name)
    if place.endswith(".py"):
        return Path(place)
    spec = _spec_of(place)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise SettingError(
            f"There is no module {place!r} for the net {name!r}; put its folder on PYTHONPATH, or name "
            "its file."
        )
    return Path(spec.origin)


def _spec_of(module: str) -> ModuleSpec | None:
    """Where a module would be imported from. `importlib.util.find_spec` imports the packages above it;
    here their folders are looked through, which is where all but packages that move `__path__` are."""
    folders, spec = None, None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        whole = ".".join(parts[:count])
        found = (
            finder.find_spec(whole, folders) for finder in sys.meta_path if hasattr(finder, "find_spec")
        )
        spec = next((one for one in found if one is not None), None)
        if spec is None:
            return None
        folders = spec.submodule_search_locations
        if folders is None and count < len(parts):
            return None
    return spec


def _not_imported(name: str, error: Exception) -> SettingError:
    return SettingError(
        f"The code of the net {name!r} cannot be imported ({type(error).__name__}: "
        f"{shorten(str(error), 200)}); mend it, or put what it imports on PYTHONPATH."
    )


def call_with(name: str, factory: Callable[..., Any], offered: dict[str, Any]) -> Any:
    """Call a factory with what its signature takes of `offered`.

    `num_classes` is also given to a factory that takes any keyword; the others only by name.

    Raises:
        SettingError: a width that is not taken, an argument that is not offered, or a failure inside.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise SettingError(f"The factory of the net {name!r} cannot be called: {error}.") from error
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "width" in offered and "width" not in parameters:
        raise SettingError(
            f"The net {name!r} has no `width`, but got width={offered['width']}; leave it out."
        )
    given = {
        key: value
        for key, value in offered.items()
        if key in parameters or (takes_all and key == "num_classes")
    }
    try:
        return factory(**given)
    except SettingError:
        raise
    except Exception as error:  # whatever a model's constructor raises
        arguments = ", ".join(f"{key}={value}" for key, value in given.items())
        raise SettingError(
            f"The net {name!r} cannot be made with {arguments or 'no arguments'} "
            f"({type(error).__name__}: {shorten(str(error), 200)})."
        ) from error


@torch.no_grad()
def checked(
    name: str, net: Any, in_channels: int, num_classes: int, image_size: Size | None
) -> nn.Module:
    """The net, if it is one that answers such images with logits of so many classes, or with something
    that `bimask.nets.admission` finds them in.

    Raises:
        SettingError: another type, another shape of the answer, or an image it cannot take.
    """
    if not isinstance(net, nn.Module):
        raise SettingError(
            f"The net {name!r} must be a torch.nn.Module, but its factory gave {type(net).__name__}."
        )
    if image_size is None:
        return net
    training = net.training
    shape = (1, in_channels, *height_and_width(image_size))
    try:
        answer = net.eval()(torch.zeros(shape))
    except Exception as error:  # whatever the model's own forward raises
        raise SettingError(
            f"The net {name!r} cannot take images {shape[1:]} ({type(error).__name__}: "
            f"{shorten(str(error), 200)}); give another `image_size` or net."
        ) from error
    try:
        take, _, _ = where_logits(answer, 1)
    except ModelError as error:
        raise SettingError(
            f"The net {name!r} must answer one image with logits {(1, num_classes)}: {error}"
        ) from error
    got = tuple(taken(answer, take).flatten(1).shape)
    if got != (1, num_classes):
        raise SettingError(
            f"The net {name!r} must answer one image with logits {(1, num_classes)}, but got {got}; "
            "let its factory take `num_classes`."
        )
    return net.train(training)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)


def _from_torchvision(
    name: str, num_classes: int, in_channels: int, image_size: Size = 224
) -> nn.Module:
    """torchvision's own model without weights; only its first convolution is made anew for images that
    have not three channels. Of the models, only vision transformers depend on the size of an image."""
    from torchvision import models

    settings: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name.startswith("vit_"):
        settings["image_size"] = image_size
    if name in ("googlenet", "inception_v3"):  # no second answer, and no warning about it
        settings |= {"aux_logits": False, "init_weights": True}
    return with_in_channels(models.get_model(name, **settings), in_channels)


def _from_timm(name: str, num_classes: int, in_channels: int, image_size: Size = 224) -> nn.Module:
    """timm's model without weights; it makes its first convolution for `in_channels` itself."""
    try:
        timm = importlib.import_module(TIMM)
    except ImportError as error:
        raise SettingError(
            f"The net 'timm:{name}' needs timm, which is not installed; pip install 'bimask[timm]'."
        ) from error
    if not timm.is_model(name):  # a name of the hub would be downloaded
        raise SettingError(f"timm has no model {name!r}; `timm.list_models()` names them.")
    settings = {"pretrained": False, "num_classes": num_classes, "in_chans": in_channels}
    try:
        return timm.create_model(name, img_size=image_size, **settings)
    except TypeError:  # its net takes any size
        return timm.create_model(name, **settings)
