"""The rooms and the package: arrows between rooms, names, sizes, and what the wheel holds.

Everything is found by looking at the folders, not at version control, so that it holds in an export as well.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ARROWS = {
    "layers": set(),
    "tokenizers": {"layers"},
    "priors": {"layers"},
    "pipeline": {"layers", "tokenizers", "priors"},
    "training": {"layers", "tokenizers", "priors", "pipeline"},
}
FRONT = ("__init__.py", "cli.py")
MAX_LINES = 350
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cff", ".json", ".sh", ".cfg", ""}
SKIPPED = {"build", "dist", "runs", "out", "shared", "__pycache__"}


def room_files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms or ARROWS for path in (ROOT / room).rglob("*.py"))


def imported_rooms(source: str, parts: tuple[str, ...]) -> set[str]:
    """The rooms (or root modules) that a module imports; `parts` is its path in the package: ("priors", "unet.py")."""
    package = ["kartina", *parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            stem = [*stem, *(node.module.split(".") if node.module else [])]
            names = [".".join([*stem, alias.name]) for alias in node.names]
        else:
            continue
        # `import layers` only works where the root is on the path: it is as wrong as a forbidden arrow.
        bare = {"layers", "priors", "pipeline", "training"}
        found |= {f"bare {name}" for name in names if name.split(".")[0] in bare}
        found |= {name.split(".")[1] for name in names if name.startswith("kartina.")}
    return found


def test_the_import_walker_sees_every_form():
    source = "from ..priors.unet import UNet\nfrom .. import training\nimport kartina.pipeline.edit\nfrom . import x\n"
    assert imported_rooms(source, ("tokenizers", "vae.py")) == {"priors", "training", "pipeline", "tokenizers"}
    assert imported_rooms("from ...layers import masks", ("training", "data", "a.py")) == {"layers"}
    assert imported_rooms("import tokenizers\nfrom tokenizers import Tokenizer", ("priors", "a.py")) == set()
    assert imported_rooms("import layers.masks", ("priors", "a.py")) == {"bare layers.masks"}


def test_imports_follow_the_arrows():
    wrong = []
    for path in room_files():
        parts = path.relative_to(ROOT).parts
        allowed = ARROWS[parts[0]] | {parts[0], "__version__"}
        allowed |= {"cli"} if parts == ("pipeline", "__main__.py") else set()  # it hands its words to the front door
        wrong += [
            f"{'/'.join(parts)} imports {room}"
            for room in imported_rooms(path.read_text(), parts)
            if room not in allowed
        ]
    assert not wrong, wrong


def test_layers_import_nothing_but_torch_and_the_standard_library():
    allowed = sys.stdlib_module_names | {"torch"}
    for path in room_files("layers"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert all(name.split(".")[0] in allowed for name in names), (path, names)


def test_the_root_has_no_module_level_relative_import():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]


def test_no_room_is_named_like_an_installed_package():
    installed = {name.lower() for name in importlib.metadata.packages_distributions()} - {"kartina"}
    names = {path.stem for path in room_files() if not path.stem.startswith("__")}
    names |= {path.parent.name for path in room_files()}
    assert not {name for name in names if name.lower() in installed} - {"tokenizers"}
    # `python training` and `python pipeline` put these two folders themselves on the path.
    runnable = {path.name.removesuffix(".py") for room in ("pipeline", "training") for path in (ROOT / room).iterdir()}
    assert not runnable & ({"evaluate", "clip", "datasets"} | set(sys.stdlib_module_names))


def test_only_tokenizers_is_a_namespace_folder():
    assert not (ROOT / "tokenizers" / "__init__.py").exists(), "it would shadow Hugging Face's tokenizers"
    folders = {path.parent for path in room_files()} - {ROOT / "tokenizers"}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert {path.name for path in ROOT.glob("*.py")} <= set(FRONT), "a module at the root enters the wheel"


def test_a_file_is_read_in_one_sitting():
    files = [*room_files(), *(ROOT / name for name in FRONT), *(ROOT / "tests").rglob("*.py")]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files if path.exists()}
    assert not {name: lines for name, lines in long.items() if lines > MAX_LINES}


def test_library_code_names_no_device():
    for path in room_files("layers", "tokenizers", "priors"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("cuda"), f"{path}:{node.lineno} names a device"


def text_files() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            f for f in folders if f not in SKIPPED and not f.endswith(".egg-info") and (f[0] != "." or f == ".ci")
        ]
        found += [Path(folder) / name for name in names if Path(name).suffix in TEXT and name != ".git"]
    return sorted(found)


def test_no_file_names_a_machine_or_an_index():
    patterns = (r"/(home|Users)/\w+/", r"(?<![\w.])/(root|work|opt|tmp)/\w+", r"--(extra-)?index-url", r"--find-links")
    patterns += (r"(?m)^-(i|f) ", r"registry\.[a-z-]+\.\w+", r"file:///", r"https?://(localhost|127\.|10\.|192\.168\.)")
    own = Path(__file__).resolve()
    wrong = []
    for path in text_files():
        text = path.read_text(errors="replace") if path != own else ""
        wrong += [
            f"{path.relative_to(ROOT)}: {match[0]!r}" for pattern in patterns for match in re.finditer(pattern, text)
        ]
    assert not wrong, wrong


def test_constraints_are_plain_pins_that_meet_the_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines)
    names = {name.lower().replace("_", "-") for name in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    assert not {re.match(r"[\w-]+", line)[0].lower() for line in wanted} - names


def test_what_is_required_is_what_the_library_imports():
    """Neither more, which every user would have to install, nor less, which would lean on what others require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"required": project["dependencies"], **project["optional-dependencies"]}
    names = {key: {re.match(r"[\w-]+", line)[0].lower() for line in lines} for key, lines in named.items()}
    distributions, imported = importlib.metadata.packages_distributions(), set()
    for path in [*room_files(), *(ROOT / name for name in FRONT)]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for module in modules:
                imported |= {name.lower().replace("_", "-") for name in distributions.get(module.split(".")[0], [])}
    optional = names["data"] | names["track"] | names["perceptual"] | names["text"]
    assert names["required"] <= imported - {"kartina"} <= names["required"] | optional


def run(*command: str, cwd: Path, **environment: str) -> str:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_importing_kartina_loads_no_torch(tmp_path):
    code = "import sys, kartina; print(kartina.__version__, 'torch' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["0.1.0", "False"]


def test_both_tokenizers_import_from_the_root():
    code = "import tokenizers, kartina.tokenizers as ours; print(tokenizers.__file__); print(*ours.__path__)"
    theirs, ours = run(sys.executable, "-c", code, cwd=ROOT).splitlines()
    assert Path(theirs).name == "__init__.py" and Path(theirs).parent != Path(ours)
    assert [path.name for path in Path(ours).glob("captions.py")], "kartina.tokenizers is not the room"


def test_pipeline_without_its_dependencies_says_make_install(tmp_path):
    done = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "pipeline"), "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "make install" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_pipeline_runs_the_package_it_lies_in(tmp_path):
    copy = tmp_path / "kartina-main"
    (copy / "pipeline").mkdir(parents=True)
    shutil.copy(ROOT / "pipeline" / "__main__.py", copy / "pipeline")
    (copy / "__init__.py").write_text("")
    (copy / "cli.py").write_text("import sys\ndef main(): print(__file__, *sys.argv[1:])\n")
    out = run(sys.executable, "pipeline", "a red dot", cwd=copy)
    assert out.strip() == f"{copy / 'cli.py'} paint a red dot"


def package_files(root: Path) -> set[str]:
    """What the wheel is to hold, by looking at the folders under `root`."""
    found = [root / name for name in (*FRONT, "accelerate_config.yaml")]
    found += [path for room in ARROWS for path in (root / room).rglob("*.py")]
    found += [path for path in (root / "pipeline" / "models").rglob("*") if path.is_file()]
    found += [path for folder in ("recipes", "launch") for path in (root / "training" / folder).rglob("*.yaml")]
    found += (root / "training" / "recipes").rglob("*.json")
    return {f"kartina/{path.relative_to(root).as_posix()}" for path in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, set[str]]:
    """The wheel and what it is to hold, from a copy, so that no build folder is left in, or read from, the checkout."""
    source, out = tmp_path_factory.mktemp("source") / "kartina-main", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in (*ARROWS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*FRONT, "accelerate_config.yaml", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wanted = package_files(source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "--no-index")
    run(*pip, "--no-build-isolation", "-w", str(out), str(source), cwd=out)
    return next(out.glob("*.whl")), wanted


def test_the_wheel_holds_the_rooms_and_nothing_else(built):
    wheel, wanted = built
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted


def test_the_wheel_installs_elsewhere_imports_and_paints(built, tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--target", str(tmp_path / "site"), str(built[0]), cwd=tmp_path)
    code = "import kartina, kartina.layers.random as draws, kartina.tokenizers as ours\n"
    code += "print(kartina.__file__, draws.__file__, *ours.__path__)"
    paths = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert all(Path(path).is_relative_to(tmp_path / "site") for path in paths), paths
    code = "from kartina.cli import main; main()"
    words = ("paint", "a red ring on a blue background", "--device", "cpu", "--out", str(tmp_path / "a.png"))
    run(sys.executable, "-c", code, *words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (32, 32)
