"""The papers say what the tree holds: links and paths lead somewhere, tables are complete, and they stay short."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_type_hints

import huggingface_hub.constants
import msgspec
import pytest
import triton.knobs

from api.anthropic.conversation import REFUSED
from api.anthropic.protocol import MessageRequest
from api.limits import CONNECTION_LIMITS
from api.metrics import Metrics
from api.protocol import NEUTRAL_VALUES, ChatCompletionRequest, CompletionRequest, EmbeddingRequest
from api.responses.protocol import NEUTRAL_VALUES as NEUTRAL_RESPONSE_VALUES
from api.responses.protocol import ResponseRequest
from engine.core.limits import LIMITS, Limit
from engine.core.stats import EngineStats
from engine.frontend.async_engine import ServedEngine
from tests.test_architecture import FILES, GROUND, ORDER, ROOT

DOCS = ROOT / "docs"
PAPERS = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(path: Path) -> str:
    """A page without its code blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The names by which headings are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def first_column(page: str) -> list[str]:
    """What stands in backticks at the start of a table's rows."""
    return re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)


def section(path: Path, heading: str) -> str:
    """The part of a page below a heading, up to the next of its kind."""
    _, rest = path.read_text().split(f"\n## {heading}\n")
    return rest.split("\n## ")[0]


@pytest.mark.parametrize("path", PAPERS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{link}: there is no {target}"
            assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("path", [path for path in PAPERS if path.name != "CHANGELOG.md"], ids=name)
def test_paths_exist(path: Path) -> None:
    """But in the changes, which name what there was."""
    folders = "engine|api|tests|benchmarks|docs"
    for file in re.findall(rf"\b(?:{folders})/[\w./-]*\w/?", prose(path)):
        assert (ROOT / file).exists(), f"there is no {file}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#\s]+)", (ROOT / "README.md").read_text()))
    assert linked == {name(path) for path in DOCS.glob("*.md")}


@pytest.mark.parametrize(("path", "limit"), [("README.md", 150), ("docs/architecture.md", 120)])
def test_they_stay_short(path: str, limit: int) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= limit


def test_the_map_has_every_folder_in_order() -> None:
    rows = first_column(section(DOCS / "architecture.md", "The map"))
    assert rows == ["api/", *(f"engine/{folder}/" for folder in reversed(ORDER))]


def test_the_map_names_ground_and_doors() -> None:
    flat = {path.stem for path in (ROOT / "engine").glob("*.py")} - {"__init__"}
    text = section(DOCS / "architecture.md", "The map").split("\n|")[0]
    named = set(re.findall(r"`(\w+)`", text))
    assert named == flat
    assert set(GROUND) <= named


def environment_variables(path: Path) -> set[str]:
    """The names that a file looks up in os.environ, by constants of its own where they have names."""
    tree = ast.parse(path.read_text())
    constants: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            elements = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            texts = {e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)}
            constants[node.targets[0].id] = texts
    for node in ast.walk(tree):
        if isinstance(node, ast.comprehension) and isinstance(node.target, ast.Name):
            constants[node.target.id] = constants.get(ast.unparse(node.iter), set())
    found: set[str] = set()
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            key = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
            key = node.args[0]
        if key is not None:
            names = {key.value} if isinstance(key, ast.Constant) else constants.get(ast.unparse(key), set())
            assert names, f"{path}: {ast.unparse(node)}: of which variable?"
            found |= {str(variable) for variable in names}
    return found


def test_the_table_of_environment_variables_is_complete() -> None:
    read = set().union(*(environment_variables(path) for path in FILES))
    own, libraries = section(DOCS / "options.md", "Environment variables").split("What libraries read")
    # What the engine reads as a library does stands there.
    assert set(first_column(own)) == read - set(first_column(libraries))
    for path in FILES:
        # Other ways to the same variables would go unseen.
        assert not re.search(
            r"from os import|environb|putenv|\.environ\.(pop|setdefault|items|keys)", path.read_text()
        )


def test_libraries_have_the_variables_that_are_said_of_them() -> None:
    _, libraries = section(DOCS / "options.md", "Environment variables").split("What libraries read")
    sources = {
        "huggingface_hub": inspect.getsource(huggingface_hub.constants),
        "triton": inspect.getsource(triton.knobs),
    }
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", libraries, re.MULTILINE)
    assert len(rows) == len(first_column(libraries)) > 0
    for variable, library in rows:
        assert f'"{variable}"' in sources[library]


def test_the_table_of_parameters_is_complete() -> None:
    """A field of type Any is not acted on: it is accepted without effect, or refused."""
    hints = {
        field: kind
        for request in (CompletionRequest, ChatCompletionRequest)
        for field, kind in get_type_hints(request).items()
    }
    fields = {
        field.name
        for request in (CompletionRequest, ChatCompletionRequest)
        for field in msgspec.structs.fields(request)
    }
    page = DOCS / "api.md"
    parameters = section(page, "Parameters")
    acted_on = {
        field for field in fields if "Any" not in str(hints[field]).replace("dict[str, typing.Any]", "")
    }
    assert set(first_column(parameters)) == acted_on
    _, ignored = parameters.split("Accepted without effect:")
    ignored, _ = ignored.split("OpenAI's other fields")
    assert set(re.findall(r"`(\w+)`", ignored)) == fields - acted_on - NEUTRAL_VALUES.keys()


@pytest.mark.parametrize(("heading", "limits"), [("A request", LIMITS), ("A connection", CONNECTION_LIMITS)])
def test_the_tables_of_limits_say_what_the_code_does(heading: str, limits: tuple[Limit, ...]) -> None:
    rows = re.findall(r"^\| `.*$", section(DOCS / "limits.md", heading), re.MULTILINE)
    assert rows == [f"| `{limit.field}` | {limit.most:.15g} | {limit.unit}{limit.note} |" for limit in limits]


def test_the_table_of_embeddings_is_complete() -> None:
    fields = {field.name for field in msgspec.structs.fields(EmbeddingRequest)}
    assert {*first_column(section(DOCS / "api.md", "Embeddings")), "user"} == fields


def test_what_is_said_of_messages_is_complete() -> None:
    fields = get_type_hints(MessageRequest)
    messages = section(DOCS / "api.md", "Messages")
    acted_on = {field for field, kind in fields.items() if kind is not Any}
    assert set(first_column(messages)) == acted_on
    _, rest = messages.split("Accepted without effect:")
    ignored, rest = rest.split("; `redacted_thinking`")
    _, rest = rest.split("Refused, by name:")
    refused = set(re.findall(r"`(\w+)`", rest.split(", blocks")[0]))
    assert refused == {*REFUSED, "thread"}
    assert set(re.findall(r"`(\w+)`", ignored)) | refused == fields.keys() - acted_on


def test_the_table_of_the_responses_api_is_complete() -> None:
    hints = get_type_hints(ResponseRequest)
    acted_on = {field for field in hints if hints[field] is not Any}
    page = (DOCS / "responses.md").read_text()
    assert set(first_column(page)) == acted_on
    ignored, refused = page.split("Accepted without effect:")[1].split("\n\n")[0].split("Refused")
    assert set(re.findall(r"`(\w+)`", refused)) == NEUTRAL_RESPONSE_VALUES.keys()
    assert set(re.findall(r"`(\w+)`", ignored)) == hints.keys() - acted_on - NEUTRAL_RESPONSE_VALUES.keys()


def test_the_table_of_metrics_is_complete() -> None:
    engine = cast(ServedEngine, SimpleNamespace(stats=EngineStats()))
    families = list(Metrics(engine, "model").registry.collect())
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert set(first_column(section(DOCS / "api.md", "Metrics"))) == names


def test_the_readme_has_the_numbers_of_the_measured_table() -> None:
    measured = {
        row[0].strip("` "): [cell.split("(")[0].strip() for cell in row[1:]]
        for row in (
            line.strip("|").split("|")
            for line in (DOCS / "quantization.md").read_text().splitlines()
            if line.startswith("| `")
        )
        if len(row) == 9
    }
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        variant, _, *numbers = (cell.strip() for cell in row.strip("|").split("|"))
        _, _, kl_divergence, _, _, memory, decode, prefill = measured[variant.strip("`")]
        assert numbers == [kl_divergence, memory, decode, prefill]


def test_the_changes_lead_to_modules_that_exist() -> None:
    rows = re.findall(r"^ *\| (.*) \| (.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for _, new in rows:
        for module in re.findall(r"`((?:engine|api)\.[\w.]*\w)", new):
            file = ROOT / module.replace(".", "/")
            # The last part may be a name within the module.
            candidates = (file, file.with_suffix(".py"), file.parent.with_suffix(".py"))
            assert any(candidate.exists() for candidate in candidates), f"there is no {module}"


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Those of modules, classes and functions, and of the constants and attributes that have some."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            match statement:
                case ast.Expr(ast.Constant(str(text))):
                    yield text


@pytest.mark.parametrize("path", FILES, ids=name)
def test_docstrings_can_be_understood_alone(path: Path) -> None:
    for text in docstrings(ast.parse(path.read_text())):
        assert not text.startswith(("Of ", "That of ", "Those of ")), f"{path}: a fragment: {text}"
