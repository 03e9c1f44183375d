"""Every section of SPEC.md and BASELINES.md that a docstring or a comment cites exists there."""

import io
import pathlib
import re
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("save_jax", "data_pipelines", "launch", "configs", "tests")

_AND = r"(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s+to\s+|\s*[-–]\s*)"
_NUMBERS = rf"\d+(?:{_AND}\d+)*"
# "spec section 6", "spec sections 3 and 4", "spec 1-5", "BASELINES.md, section 2", and a bare
# "sections 3, 4" or "section 7's"; but not a paper's, "(Gong et al. 2021, section 2.2)".
_CITATION = re.compile(
    r"(?:\b(?P<document>SPEC|specification|BASELINES)(?:\.md)?(?:'s)?[\s,(]+(?:sections?\s+)?"
    r"|(?<!\d, )(?<!\d )\bsections?\s+)"
    rf"(?P<numbers>{_NUMBERS})(?![\d.]*\.\d)\b",
    re.IGNORECASE,
)


def sections(document: str) -> set[int]:
    """Reads the numbers of a document's sections from its headings."""
    return {int(number) for number in re.findall(r"^## (\d+)\. \S", document, re.MULTILINE)}


def citations(text: str) -> list[tuple[str, int]]:
    """Finds the cited sections as (document, number); a bare "section" is one of SPEC.md."""
    found = []
    for match in _CITATION.finditer(text):
        named = (match["document"] or "").upper()
        document = "BASELINES.md" if named == "BASELINES" else "SPEC.md"
        numbers = [int(number) for number in re.findall(r"\d+", match["numbers"])]
        for i, separator in enumerate(re.findall(_AND, match["numbers"])):
            if re.search(r"to|[-–]", separator):
                numbers += range(numbers[i] + 1, numbers[i + 1])
        found += [(document, number) for number in sorted(numbers)]
    return found


def prose(source: str) -> str:
    """Returns the strings and comments of a Python file, a comment of several lines as one."""
    parts = []
    last = -2  # the line of the last comment
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("#: ")
            joined = token.start[0] == last + 1
            parts.append(f" {text}" if joined else f"\n\n;{text}")
            last = token.start[0]
        elif token.type == tokenize.STRING:
            parts.append(f"\n\n;{token.string}")
    return "".join(parts)


def unknown(found: list[tuple[str, int]], documents: dict[str, set[int]]) -> list[tuple[str, int]]:
    """Returns the citations whose section no document has."""
    return [(document, number) for document, number in found if number not in documents[document]]


def read_documents() -> dict[str, set[int]]:
    return {
        name: sections((ROOT / "save_jax" / name).read_text(encoding="utf-8"))
        for name in ("SPEC.md", "BASELINES.md")
    }


def test_every_cited_section_exists():
    documents = read_documents()
    cited, wrong = 0, []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path == pathlib.Path(__file__):
                continue  # its own examples are no citations
            found = citations(prose(path.read_text(encoding="utf-8")))
            cited += len(found)
            wrong += [(str(path.relative_to(ROOT)), *each) for each in unknown(found, documents)]
    assert not wrong, f"sections that do not exist: {wrong}"
    assert cited >= 40, f"only {cited} citations were found: does the finder know their spelling?"


def test_sections_are_numbered_from_one_without_gaps():
    documents = read_documents()
    assert documents["SPEC.md"] == set(range(1, 13))
    assert documents["BASELINES.md"] == set(range(1, 12))


def test_the_finder_knows_each_spelling():
    def numbers(text: str) -> list[int]:
        assert {document for document, _ in citations(text)} <= {"SPEC.md"}, text
        return [number for _, number in citations(text)]

    assert numbers("The losses (spec section 6).") == [6]
    assert numbers("Ours (spec\n    sections 3 and 4; AVIGATE's).") == [3, 4]
    assert numbers("captions and videos out (spec 1-5).") == [1, 2, 3, 4, 5]
    assert numbers("merged into its frames (spec sections 2 to 4).") == [2, 3, 4]
    assert numbers("Spec section 12, at full size: 86 tensors") == [12]
    assert numbers("Spec section 10, and section 6 for the margin") == [10, 6]
    assert numbers("(sections 3, 4)") == [3, 4]
    assert numbers("The row of section 7's table") == [7]
    assert numbers("straight from the specification (section 8).") == [8]
    assert numbers("(SPEC.md, section 9)") == [9]
    assert citations("Pools (BASELINES sections 1 and 2)") == [
        ("BASELINES.md", 1),
        ("BASELINES.md", 2),
    ]
    assert citations("BASELINES.md, section 7; spec 5") == [("BASELINES.md", 7), ("SPEC.md", 5)]
    # A paper's own sections, and numbers that are no citation.
    assert not citations("as the original (Gong et al. 2021, section 2.2, and its code)")
    assert not citations("NamedSharding(mesh, PartitionSpec()), 8 devices, spec of 12 rows")


def test_a_section_that_does_not_exist_is_found():
    source = (
        '"""Fuses (spec section 4)."""\nx = 1  # see spec\n# section 99, and BASELINES section 12\n'
    )
    found = citations(prose(source))
    assert found == [("SPEC.md", 4), ("SPEC.md", 99), ("BASELINES.md", 12)]
    documents = {"SPEC.md": sections("# Spec\n\n## 4. Fusion\n"), "BASELINES.md": {1}}
    assert unknown(found, documents) == [("SPEC.md", 99), ("BASELINES.md", 12)]
