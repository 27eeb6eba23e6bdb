"""The throw-away process of `trojai.py`: a whole module in, its weights as safetensors out.

Run as a script, without bimask: `python -I trojai_worker.py MODEL.pt OUT.safetensors`. It limits itself
before it opens the file: memory, processor time, size of what it writes, no core dump. Names in the
pickle are allowed if they are layer classes of torch, torchvision or timm, found by import and checked
to be such; `torch.load(weights_only=True)` is given those alone.

Exit code 0, or 3 with one sentence on stderr.
"""

import importlib
import os
import pickletools
import resource
import sys
import zipfile

GIGABYTE = 2**30
LIMITS = {
    resource.RLIMIT_CPU: 300,  # seconds
    resource.RLIMIT_FSIZE: 8 * GIGABYTE,
    resource.RLIMIT_CORE: 0,
}
PACKAGES = ("torch.nn.", "torchvision.models.", "torchvision.ops.", "timm.")
TENSORS = {  # what a tensor, a container of torch or a plain attribute asks for
    "_codecs encode",
    "collections OrderedDict",
    "__builtin__ set",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}" for kind in ("float16", "float32", "float64", "bfloat16", "int64")),
    *(
        f"torch {kind}Storage"
        for kind in ("BFloat16", "Bool", "Double", "Float", "Half", "Int", "Long")
    ),
}


class Refused(Exception):
    """One sentence for the user."""


def names_in(path: str) -> set[str]:
    """The globals a pickle asks for, by disassembly."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"it holds {len(pickles)} pickles, but a module saved by torch.save has one")
        operations = pickletools.genops(archive.read(pickles[0]))
        return {str(argument) for code, argument, _ in operations if code.name == "GLOBAL"}


def layer_class(name: str) -> type:
    """The class of a layer by its name in a pickle."""
    import torch

    module, _, attribute = name.partition(" ")
    if f"{module}.".startswith(PACKAGES) and attribute.isidentifier():
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
        code = (torch.fx.GraphModule, torch.jit.ScriptModule)  # modules that hold code
        if (
            isinstance(found, type)
            and issubclass(found, torch.nn.Module)
            and not issubclass(found, code)
        ):
            return found
    raise Refused(
        f"it asks for {name.replace(' ', '.')!r}, which is no layer class of the torch, "
        "torchvision or timm that are installed"
    )


def limit(file_size: int) -> None:
    """What this process may take from here on; torch alone has taken gigabytes of addresses before."""
    for kind, value in LIMITS.items():
        resource.setrlimit(kind, (value, value))
    if os.path.exists("/proc/self/statm"):
        with open("/proc/self/statm") as pages:
            taken = int(pages.read().split()[0]) * resource.getpagesize()
        value = taken + 3 * file_size + 2 * GIGABYTE  # the file mapped, read and copied
        resource.setrlimit(resource.RLIMIT_AS, (value, value))


def main(source: str, target: str) -> None:
    import torch
    from safetensors.torch import save_file

    limit(os.path.getsize(source))
    try:
        asked = sorted(names_in(source) - TENSORS)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise Refused(f"it is not a whole file of torch.save ({type(error).__name__})") from None
    layers = {name: layer_class(name) for name in asked}
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(
        [(kind, name.replace(" ", ".")) for name, kind in layers.items()]
    )
    try:
        module = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        module_class = torch.nn.Module  # an attribute of the module's own may hide its method
        state = module_class.state_dict(module) if isinstance(module, module_class) else None
    except Exception as error:  # a hostile pickle can raise anything
        raise Refused(f"its contents are malformed ({type(error).__name__})") from None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise Refused(f"it holds {type(module).__name__}, but a module with weights is expected")
    for name, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise Refused(f"it declares {name[:80]!r} larger than its bytes")
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    outputs = list(state.values())[-1].shape[:1].numel()  # safetensors sorts the names
    copies = {name: value.detach().clone().contiguous() for name, value in state.items()}
    save_file(copies, target, {"class": kind, "outputs": str(outputs)})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Refused as refusal:
        sys.stderr.write(f"{refusal}\n")
        sys.exit(3)
