"""Python as something to package: what is read of the sources, and what is refused with which words."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from pierhead.engines.python_settings import TABLE
from pierhead.errors import CorruptData, UnsafeContent, UsageError
from pierhead.formats.python_model import NAME, decode
from pierhead.package.build import package
from pierhead.package.inputs import custom
from pierhead.package.python_model import Program, find, is_program, prepare, settings_of
from pierhead.package.recipe import Recipe
from pierhead.sources.check import check
from pierhead.store.layout import Store

CLASS = """
class Base:
    def load(self, folder): ...

class Mine(Base):
    max_batch_size = 8
    batch_delay_ms: float = 2.5
    other = [1]
    def predict(self, x: list[float]): ...
    async def chat(self, messages): ...

class Helper:
    def classify(self, text): ...
"""


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py").replace("_txt", ".txt").replace("_toml", ".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder


def refused(path: Path) -> UsageError:
    with pytest.raises(UsageError) as told:
        find(path)
    return told.value


def test_the_class_that_loads_is_found_with_its_methods_and_constants(tmp_path: Path) -> None:
    program = find(written(tmp_path, mine_py=CLASS) / "mine.py")
    served = program.served
    assert (served.module, served.cls, served.methods) == ("mine", "Mine", ("chat", "predict"))
    assert settings_of(program) == {"max_batch_size": 8, "batch_delay_ms": 2.5}
    assert not served.tensors
    assert [f.name for f in program.files] == ["mine.py"]


def test_requirements_come_from_the_script_its_list_or_its_project(tmp_path: Path) -> None:
    script = '# /// script\n# requires-python = ">=3.12"\n# dependencies = [\n#   "numpy>=2",\n# ]\n# ///\n'
    one = written(tmp_path / "a", mine_py=script + CLASS, requirements_txt="left-out")
    needs = find(one / "mine.py").needs
    assert (needs.requirements, needs.python) == (("numpy>=2",), ">=3.12")
    lines = "# a comment\nnumpy==2.1 ; python_version>'3'  # why\nscipy \\\n  >=1\ntorch==2 --hash=sha256:00\n\n"
    two = written(tmp_path / "b", mine_py=CLASS, requirements_txt=lines)
    assert find(two).needs.requirements == ('numpy==2.1; python_version > "3"', "scipy>=1", "torch==2")
    toml = """
        [project]
        dependencies = ["pandas"]
        requires-python = ">=3.11"
        [tool.pierhead]
        model = "pkg.deep:Helper"
        max_batch_size = 4
    """
    three = written(tmp_path / "c", src__pkg__deep_py=CLASS, src__pkg____init___py="", pyproject_toml=toml)
    program = find(three)
    assert (program.served.module, program.served.cls) == ("pkg.deep", "Helper")
    assert program.needs.requirements == ("pandas",)
    assert settings_of(program) == {"max_batch_size": 4}
    assert is_program(three)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"mine_py": "def x(:"}, "mine.py, line 1"),
        ({"mine_py": "x = 1"}, "no class that can be served"),
        ({"mine_py": CLASS + CLASS.replace("Mine", "Second").replace("Base", "B2")}, "several classes"),
        ({"mine_py": CLASS, "requirements_txt": "-e ."}, "line 1: '-e .' is an option of pip's"),
        ({"mine_py": CLASS, "requirements_txt": "a b c"}, "'a b c' is not a requirement"),
        ({"mine_py": CLASS, "requirements_txt": "a @ https://x/y.whl"}, "names an address"),
        ({"mine_py": CLASS, "pyproject_toml": "[project"}, "pyproject.toml"),
        ({"mine_py": CLASS, "pyproject_toml": '[tool.pierhead]\nmodel = "mine:None"'}, "has no class mine:None"),
        ({"mine_py": CLASS, "pyproject_toml": "[project]\ndependencies = [1]"}, "not a list of requirements"),
    ],
)
def test_what_cannot_be_packaged_is_refused_with_the_place(tmp_path: Path, files: dict[str, str], said: str) -> None:
    assert said in refused(written(tmp_path, **files)).message


def test_members_that_are_misspelt_are_told_with_what_is_close(tmp_path: Path) -> None:
    text = """
        class Mine:
            max_batchsize = 4
            concurency: int = 3
            memory = "1GiB"
            words = {}
            def laod(self, folder): ...
            def predict(self, x): ...
            def reload(self): ...
            def loaded(self): ...
    """
    program = find(written(tmp_path, mine_py=text) / "mine.py")
    near = {"laod": "load", "max_batchsize": "max_batch_size", "concurency": "concurrency"}
    assert program.served.misspelt == near


@pytest.mark.parametrize("kind", ["int", "dict[str, int]", "Item"])
def test_batches_for_a_method_that_takes_no_list_are_refused(tmp_path: Path, kind: str) -> None:
    text = f"""
        class Item: ...
        class Mine:
            max_batch_size = 2
            def predict(self, x: {kind}): ...
    """
    with pytest.raises(UsageError, match="gets a list") as told:
        inputs(written(tmp_path / "m", mine_py=text), tmp_path)
    assert f"list[{kind}]" in (told.value.hint or "")


def test_a_setting_of_another_engine_changes_nothing_of_a_python_model() -> None:
    with pytest.raises(UsageError, match="max-batch"):
        TABLE.canonical({"max-batch": 3})


def test_a_folder_of_weights_with_somebodys_code_is_not_taken_for_a_python_model(tmp_path: Path) -> None:
    assert not is_program(written(tmp_path / "a", modeling_x_py="class X:\n    def predict(self): ..."))
    written(tmp_path / "b", mine_py=CLASS)
    (tmp_path / "b" / "m.gguf").touch()
    assert not is_program(tmp_path / "b")
    assert is_program(written(tmp_path / "c", mine_py=CLASS))


def inputs(folder: Path, scratch: Path) -> Any:
    program: Program = find(folder)
    return prepare(program, settings_of(program), scratch, (), lock=False)


def test_a_packaged_model_says_what_it_is_before_any_of_it_runs(tmp_path: Path, store: Store) -> None:
    bomb = CLASS + "\nraise SystemExit('this must never run here')\n"
    folder = written(tmp_path / "m", mine_py=bomb, requirements_txt="numpy>=2")
    (folder / "weights.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    recipe = Recipe("mine", inputs(folder, tmp_path), "2026-01-01T00:00:00Z")
    record = package(store, recipe)
    about = record.metadata["python"]
    assert (record.metadata["format"], about["class"], about["requirements"]) == ("python", "Mine", ["numpy>=2"])
    roles = {file.name: (file.role, file.format) for file in store.get("mine").files}
    assert roles == {
        "mine.py": ("code", ""),
        "requirements.txt": ("config", ""),
        "weights.npz": ("weights", "numpy"),
        NAME: ("code", "python"),
    }
    assert package(store, recipe).digest == record.digest


def test_the_same_files_from_elsewhere_are_refused_unless_somebody_vouches(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", mine_py=CLASS)
    made = [(f.name, f.path) for f in inputs(folder, tmp_path).files]
    with pytest.raises(UnsafeContent, match="its author's code is run"):
        check(made, allow=False, again="…")
    assert check(made, allow=True, again="…")[1].startswith(NAME)
    assert check(made, allow=False, again="…", vouched=True)[1] == ""


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"[" * 100_000,
        b'{"module":"os/../x","class":"A","methods":["predict"]}',
        b'{"module":"m","class":"A","methods":["delete"]}',
        b'{"module":"m","class":"A","methods":["predict"],"locked":["--index-url=http://evil"]}',
        b'{"module":"m","class":"A","methods":["predict"],"requirements":["./here"]}',
        b'{"module":"m","class":"A","methods":["predict"],"schema":2}',
    ],
)
def test_a_file_that_says_something_else_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptData):
        decode(text)


def test_hidden_files_and_caches_stay_out(tmp_path: Path) -> None:
    folder = written(tmp_path, mine_py=CLASS)
    for name in (".env", "__pycache__/mine.cpython-311.pyc", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert [f.name for f in custom(folder).files] == ["mine.py"]
