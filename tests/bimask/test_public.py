import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

import bimask

ROOT = Path(__file__).parents[2]
HEAVY = ("ray", "optuna", "mlflow", "study", "sklearn", "torchvision", "matplotlib")
PACKAGES = ("bimask", "study")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DOORS = {
    "ray": [
        f"study/search/{name}.py"
        for name in (
            *("actor", "cluster", "driver", "jobs", "pareto_search", "preflight", "tasks", "victims"),
            *("embedded/exposure", "embedded/liveness", "embedded/own_ray"),
        )
    ],
    "optuna": [
        f"study/{name}.py"
        for name in (
            *("analysis/importance", "search/optuna_door", "search/pareto_search", "search/samplers"),
        )
    ],
    "mlflow": [
        f"study/{name}.py"
        for name in (
            *("promotion/registry", "promotion/served_model"),
            *("tracking/client", "tracking/comparison_run", "tracking/mlflow_runs"),
        )
    ],
}
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imports_of(source):
    """Top-level packages that a source imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def unsafe_calls_of(source):
    """Calls that read or write pickles, such as torch.load without weights_only=True."""
    return [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and is_unsafe(node)
    ]


def is_unsafe(call):
    name = ast.unparse(call.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load":
        return options.get("weights_only") != "True"
    if name in ("np.load", "numpy.load"):
        return options.get("allow_pickle") == "True"
    return name == "torch.save" or name.split(".")[0] in ("pickle", "joblib", "dill", "cloudpickle")


def loaded_after(code):
    """Which of the heavy packages a fresh interpreter has loaded after this code."""
    report = f"import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


# --- the public names ---


def isort_key(name):
    """Constants first, then classes, then the rest, each by name."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_sorted():
    assert bimask.__all__ == sorted(bimask.__all__, key=isort_key)


def test_all_is_what_is_public():
    public = {
        name
        for name, value in vars(bimask).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert set(bimask.__all__) == public
    assert len(bimask.__all__) == len(public)


def test_public_things_are_documented():
    for name in bimask.__all__:
        value = getattr(bimask, name)
        assert isinstance(value, dict) or value.__doc__, name


def test_every_error_is_a_bimask_error():
    from bimask import errors

    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(classes) >= 7
    assert all(issubclass(error, bimask.BimaskError) for error in classes)
    assert all(error.__name__ in errors.__doc__ for error in classes)


# --- layers ---


def test_bimask_loads_nothing_heavy():
    assert loaded_after("import bimask") == []


def test_what_is_loaded_would_be_seen():
    assert loaded_after("import bimask, sklearn") == ["sklearn"]


def test_all_files_are_scanned():
    names = {str(path.relative_to(ROOT)) for path in FILES}
    wanted = {"bimask/defences/ims/purify.py", "bimask/attacks/base.py", "study/search/driver.py"}
    assert wanted <= names


@EACH_FILE
def test_heavy_packages_are_imported_behind_their_doors_only(path):
    here = str(path.relative_to(ROOT))
    for package in imports_of(path.read_text()) & DOORS.keys():
        assert here in DOORS[package]


@pytest.mark.parametrize("package", DOORS)
def test_the_doors_are_where_they_are_said_to_be(package):
    for file in DOORS[package]:
        assert package in imports_of((ROOT / file).read_text()), file


@pytest.mark.parametrize("path", sorted((ROOT / "bimask").rglob("*.py")), ids=lambda path: path.stem)
def test_bimask_never_imports_the_study(path):
    assert not imports_of(path.read_text()) & {"study", "ray", "optuna", "mlflow"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import ray.tune as t", {"ray"}),
        ("def f():\n    from mlflow.tracking import MlflowClient", {"mlflow"}),
        ("if True:\n    import a, b.c", {"a", "b"}),
        ("from . import ray", set()),
    ],
)
def test_imports_are_found_wherever_they_stand(source, found):
    assert imports_of(source) == found


# --- no pickles ---


@EACH_FILE
def test_no_pickle_is_read_or_written(path):
    """But one, which is another project's format."""
    allowed = {"bimask/interop/backdoorbench_writer.py": ["torch.save"]}
    assert unsafe_calls_of(path.read_text()) == allowed.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(f)", ["torch.load"]),
        ("x = torch.load(f, weights_only=False)", ["torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("def g():\n    pickle.dump(x, f)", ["pickle.dump"]),
        ("torch.save(x, f)", ["torch.save"]),
        ("np.load(f, allow_pickle=True)", ["np.load"]),
        ("json.load(f)", []),
    ],
)
def test_unsafe_calls_are_found(source, found):
    assert unsafe_calls_of(source) == found
