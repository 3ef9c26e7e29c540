"""The version, the supported range and the public interface are as they are written down."""

import pathlib
import re
import tomllib

from public_interface import FILE, describe

import natgalore_jax as ng

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lowest_versions(requirements):
    """The lower bounds, by name; those of extras that are named by an extra as well."""
    bounds = {}
    for requirement in requirements:
        if extras := re.fullmatch(r"natgalore-jax\[(.+)\]", requirement):
            for extra in extras[1].split(","):
                bounds |= lowest_versions(PROJECT["optional-dependencies"][extra])
        else:
            name, bound = requirement.split(">=")
            bounds[name.split("[")[0]] = bound
    return bounds


def pins(file):
    lines = (ROOT / file).read_text().splitlines()
    return [line.split(";")[0].split("==") for line in lines if not line.startswith("#")]


def test_the_version_is_the_same_everywhere():
    assert PROJECT["version"] == ng.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [ng.__version__]
    (released,) = re.findall(r'^date-released: "(.+)"$', citation, re.MULTILINE)
    assert f"## [{ng.__version__}] - {released}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_changelog_is_of_this_version():
    """The newest release in it is this version, or there is none yet and all is unreleased."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings[0] in ("Unreleased", ng.__version__)
    assert released[:1] in ([], [ng.__version__])


def test_lowest_versions_are_those_that_the_package_allows():
    required = lowest_versions(PROJECT["dependencies"])
    required |= lowest_versions(["natgalore-jax[tests]"])
    pinned = dict(reversed(pins("constraints-lowest.txt")))
    for name, bound in required.items():
        assert f"{pinned[name]}.".startswith(f"{bound}."), (name, bound, pinned[name])


def test_every_requirement_has_a_pinned_version():
    every = PROJECT["dependencies"] + [
        r for extra in PROJECT["optional-dependencies"].values() for r in extra
    ]
    pinned = {name.lower().replace("_", "-") for name, _ in pins("constraints.txt")}
    assert {name.lower().replace("_", "-") for name in lowest_versions(every)} <= pinned


def test_the_page_on_versions_names_the_range():
    page = (ROOT / "docs" / "versions.md").read_text()
    for name, bound in lowest_versions(PROJECT["dependencies"]).items():
        assert f"| {name} | {bound} |" in page
    lowest_python = PROJECT["requires-python"].removeprefix(">=")
    assert f"| Python | {lowest_python} |" in page


def test_public_interface_is_the_promised_one():
    assert describe() == FILE.read_text(), (
        "the public interface has changed. If that is meant, run python tests/public_interface.py "
        "and say in CHANGELOG.md what has changed"
    )
