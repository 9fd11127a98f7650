# SPDX-License-Identifier: Apache-2.0
"""The documentation, held to the program: what one says and the other does not is a failure.

Every check is a function from a page's text to the differences it finds; beside each stands a test that the check
finds a difference in a page that was altered.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from lab import guest, images
from lab.disks import DiskSpec
from lab.qemu import BareQemu
from pullback import errors
from pullback.cli.config import find_domain, load_config
from pullback.cli.main import command_line
from pullback.engine import events
from pullback.model.manifest import DiskEntry, Manifest
from pullback.model.units import CHUNK, HOT_CHUNK, MIB, SEGMENT
from pullback.plan.freeze import CBW_TIMEOUT
from pullback.plan.grid import WIDELY
from pullback.plan.prove import SAMPLE
from tests.support import fake_guestfish
from tests.support.backups import open_repository, store_backup
from tests.support.markdown import code_blocks, named, plain, rows, sections, without_code
from tests.support.product import Done, Stage
from tests.support.restic import PASSWORD, needs_restic
from tests.support.serving import serving

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))


def page(name: str) -> str:
    return (DOCS / name).read_text()


def differences(what: str, documented: Iterable[Any], real: Iterable[Any]) -> list[str]:
    documented, real = set(documented), set(real)
    return [f"{what}: {x} is documented only" for x in sorted(documented - real, key=str)] + [
        f"{what}: {x} is not documented" for x in sorted(real - documented, key=str)
    ]


# -- exit codes ---------------------------------------------------------------------------------------------------

WITHOUT_CLASS = {0, 130}


def error_classes() -> dict[str, tuple[int, str]]:
    """Every exception's exit code and parent."""
    found = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, errors.PullbackError)]
    return {cls.__name__: (cls.exit_code, cls.__base__.__name__ if cls.__base__ else "") for cls in found}


def drawn_tree(docstring: str) -> dict[str, tuple[int, str]]:
    """The same from the picture in the module's docstring."""
    found: dict[str, tuple[int, str]] = {}
    above: list[tuple[int, str]] = [(-1, "Exception")]
    for line in docstring.splitlines():
        if match := re.match(r"^    ([│├└─ ]*)(\w+) {2,}(\d+)", line):
            depth = len(match[1])
            while above[-1][0] >= depth:
                above.pop()
            found[match[2]] = (int(match[3]), above[-1][1])
            above.append((depth, match[2]))
    return found


def check_exit_codes(text: str) -> list[str]:
    table = [(int(row[0]), plain(row[1])) for row in rows(text)]
    real = [(code, name) for name, (code, _) in error_classes().items()]
    return differences("exit code", table, real + [(code, "") for code in WITHOUT_CLASS])


def test_the_drawn_tree_of_errors_is_the_real_one() -> None:
    drawn = drawn_tree(errors.__doc__ or "")
    assert drawn == error_classes()
    assert len(drawn) > 15


def test_a_wrongly_drawn_tree_is_seen() -> None:
    document = errors.__doc__ or ""
    assert drawn_tree(document.replace("├── TargetExists", "TargetExists")) == drawn_tree(document)
    assert drawn_tree(document.replace("│   └── TargetExists", "├── TargetExists")) != error_classes()
    assert drawn_tree(re.sub(r"(TargetExists +)9", r"\g<1>8", document)) != error_classes()


def test_every_exit_code_is_documented() -> None:
    assert not check_exit_codes(page("exit-codes.md"))


# -- JSON ---------------------------------------------------------------------------------------------------------

EVENTS = {cls.event: cls for cls in events.Event.__subclasses__()}
KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "string or null": (str, type(None)),
    "integer": (int,),
    "number": (int, float),
    "list": (list,),
    "boolean": (bool,),
    "object": (dict,),
    "object or null": (dict, type(None)),
    "any": (object,),
}


def documented_objects(text: str) -> dict[str, dict[str, str]]:
    """Sections of docs/json.md with fields, each field with its type."""
    found = {heading: {plain(row[0]): row[1] for row in rows(body)} for heading, body in sections(text).items()}
    return {heading.replace("`", ""): fields for heading, fields in found.items() if set(fields.values()) <= {*KINDS}}


def check_event_classes(text: str) -> list[str]:
    known = documented_objects(text)
    problems = []
    for name, cls in EVENTS.items():
        fields = {field.name for field in dataclasses.fields(cls)} | {"event"}
        problems += differences(f"event {name}", known.get(name, {}), fields)
    return problems


def check_object(text: str, heading: str, value: Mapping[str, Any]) -> list[str]:
    fields = documented_objects(text).get(heading, {})
    wrong = [
        f"{heading}.{key} is no {fields[key]}: {value[key]!r}"
        for key in fields.keys() & value.keys()
        if not isinstance(value[key], KINDS[fields[key]])
        or (isinstance(value[key], bool) and bool not in KINDS[fields[key]] and fields[key] != "any")
    ]
    return differences(heading, fields, value) + wrong


def check_manifest_fields(text: str, cls: type) -> list[str]:
    after = text.partition(f"<!-- fields: {cls.__name__} -->\n")[2].partition("\n\n")[0]
    extra = ["format"] if cls is Manifest else []
    real = [field.name for field in dataclasses.fields(cls)] + extra
    return differences(cls.__name__, [plain(row[0]) for row in rows(after)], real)


def every_command(stage: Stage, lab_dir: Path) -> Iterator[tuple[str, Done]]:
    """What each command prints with --json, errors included."""
    new = {"RESTIC_REPOSITORY": str(lab_dir / "new")}
    yield "init", stage.cli("init", "--json", env=new)
    yield "init", stage.cli("init", "--json", env=new)
    disks = [stage.disk("vda"), DiskSpec(stage.disk("vdb", format="raw").path, "vdb", "raw", read_only=True)]
    with BareQemu(disks, name="web", running=True) as qemu:
        qemu.device_write("vda", 0, MIB)
        yield "backup", stage.cli_backup(qemu, "--json")
        yield "backup", stage.cli_backup(qemu, "--json")
        yield from every_command_on(qemu, stage)
    repository = open_repository(stage.repo)
    with repository.lock():
        store_backup(repository, {"vda": [b"x"]}, domain="broken", manifest=b"{")
    yield "list", stage.cli("list", "--json")
    yield "restore", stage.cli("restore", "web@latest", "--to", stage.place / "out", "--json")
    yield "restore", stage.cli("restore", "web@latest", "--instant", "--to", lab_dir / "now", "--json")
    ends = ("-accel", "tcg", "-m", "64M", "-no-reboot", "-boot", "reboot-timeout=1")
    yield "boot", stage.cli("boot", "web@latest", "--disk", "vda", "--json", "--", *ends)
    yield "restore", stage.cli("restore", "web@latest", "--into", f"disk:{disks[0].path}", "--disk", "vda", "--json")
    with serving(stage, "web@latest") as server:
        yield "serve", server.end()
    guestfish = {**fake_guestfish.install(lab_dir / "bin"), "FAKE_GUESTFISH": "kvm-fails"}
    yield "files", stage.cli("files", "web@latest", "--json", env=guestfish)
    yield "files", stage.cli("files", "web@latest", "/etc", "--json", env=guestfish)
    yield "files", stage.cli("files", "web@latest", "/hello", "--to", lab_dir / "files", "--json", env=guestfish)
    yield from every_command_of_restic(stage, lab_dir)
    yield "show", stage.cli("show", "web@latest", "--json")
    big = max((stage.repo / "data").glob("*/*"), key=lambda path: path.stat().st_size)
    os.truncate(big, big.stat().st_size // 2)
    yield "verify", stage.cli("verify", "--all", "--data", "--json")


def every_command_of_restic(stage: Stage, lab_dir: Path) -> Iterator[tuple[str, Done]]:
    """The same of the commands that restic carries out."""
    (password := stage.place / "password").write_text(PASSWORD)
    yield "copy", stage.cli("copy", "--to", lab_dir / "new", "web@latest", "--json")
    yield "forget", stage.cli("forget", "--keep-last", "1", "--json")
    yield "prune", stage.cli("prune", "--json")
    yield "check", stage.cli("check", "--json")
    yield "unlock", stage.cli("unlock", "--json")
    yield "key add", stage.cli("key", "add", "--new-password-file", password, "--json")
    yield "key passwd", stage.cli("key", "passwd", "--new-password-file", password, "--json")
    listed = stage.cli("key", "list", "--json")
    yield "key list", listed
    (old,) = (key["id"] for key in listed.event("restic")["output"][0] if not key["current"])
    yield "key remove", stage.cli("key", "remove", old, "--json")


def every_command_on(qemu: BareQemu, stage: Stage) -> Iterator[tuple[str, Done]]:
    """The same of the commands on a domain; at its end there is a bitmap of ours that is of no use."""
    (config := stage.place / "config.toml").write_text(f'[domain.web]\nqmp = "{qemu.qmp_path}"\n')
    domain = f"qmp:{qemu.qmp_path}"
    scratch = ("--scratch", str(stage.scratch))
    given: list[tuple[str, tuple[str, ...]]] = [
        ("domain list", ("--config", str(config))),
        ("snapshot create", (domain, "one", "--checkpoint", "A", *scratch)),
        ("snapshot create", (domain, "two", "--checkpoint", "B", *scratch, "--dry-run")),
        ("snapshot list", (domain, "--trace")),
        ("export start", (domain, "--snapshot", "one", "--all-checkpoints", "--socket", str(qemu.directory / "nbd"))),
        ("export list", (domain,)),
        ("checkpoint list", (domain,)),
        ("checkpoint size", (domain, "A")),
        ("domain show", (domain,)),
        ("domain show", (domain, "--xml")),
        ("domain show", (domain, "--repo", str(stage.repo))),
        ("export stop", (domain,)),
        ("export stop", (domain, "nonsense")),
        ("snapshot delete", (domain, "one")),
        ("checkpoint delete", (domain, "A")),
    ]
    for command, arguments in given:
        yield command, stage.cli(*command.split(), *arguments, "--json")
    qemu.qmp("block-dirty-bitmap-add", node="node-vda", name="pullback-lost^gone", disabled=True)
    yield "domain show", stage.cli("domain", "show", domain, "--json")
    yield "recover", stage.cli("recover", domain, "--json", "--dry-run")


def heading_of(event: Mapping[str, Any]) -> str:
    return "domain with --xml" if "xml" in event else str(event["event"])


def inner_objects(event: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    kind = event["event"]
    if outlook := event.get("next_backup"):
        yield "a domain's next_backup", outlook
        yield from (("one of a next backup's disks", disk) for disk in outlook["disks"])
    for heading, name, key in [
        ("backups", "one of backups", "backups"),
        ("restore", "one of a restore's disks", "disks"),
        ("restore_in_place", "one of a restore in place's disks", "disks"),
        ("filesystems", "one of filesystems", "filesystems"),
        ("files", "one of entries", "entries"),
        ("serving", "one of a serving's exports", "exports"),
        ("verified", "one of damages", "damages"),
        ("retention", "one of a retention's backups", "keep"),
        ("retention", "one of a retention's backups", "forget"),
        ("domains", "one of domains", "domains"),
        ("domain", "one of a domain's disks", "disks"),
        ("domain", "one of a domain's snapshots", "snapshots"),
        ("domain", "one of exports", "exports"),
        ("checkpoints", "one of checkpoints", "checkpoints"),
        ("changes", "one of a change's disks", "disks"),
        ("snapshots", "one of snapshots", "snapshots"),
        ("exports", "one of exports", "exports"),
    ]:
        for one in event.get(key, ()) if kind == heading else ():
            yield ("a damaged one of backups" if "damaged" in one else name), one
            yield from (("one of a damage's touched", x) for x in one.get("touched", ()))
            yield from ((f"one of a disk's {inner}", x) for inner in ("chain", "broken") for x in one.get(inner, ()))


ALSO = {"error", "trace", "command"}


def test_everything_that_json_output_holds_is_documented(tmp_path: Path, lab_dir: Path) -> None:
    text = page("json.md")
    table = rows(text.partition("\n## ")[0])
    prints = {named(row[0])[0]: set(named(row[1])) for row in table if row[0].startswith("`")}
    assert not differences("command", prints, commands())
    seen: set[str] = set()
    for command, done in every_command(Stage(tmp_path), lab_dir):
        assert not done.err
        for event in done.events:
            for heading, value in [(heading_of(event), event), *inner_objects(event)]:
                seen.add(heading)
                assert not check_object(text, heading, value)
            assert event["event"] in prints[command] | ALSO
            for disk in event.get("disks", []) if event["event"] in ("backup", "backups") else []:
                assert not differences("disk", disk, [field.name for field in dataclasses.fields(DiskEntry)])
    assert not differences("object", documented_objects(text), seen)


def test_every_event_is_documented() -> None:
    assert {"note", "disk", "frozen", "progress"} <= EVENTS.keys()
    assert not check_event_classes(page("json.md"))


@pytest.mark.parametrize("cls", [Manifest, DiskEntry])
def test_the_manifest_is_documented(cls: type) -> None:
    assert not check_manifest_fields(page("repository.md"), cls)


# -- the command line ---------------------------------------------------------------------------------------------

EVERYWHERE = "Options of all commands"
#: Sections of options that several commands have; each says which before its table.
SHARED = (
    "Options of commands on a repository",
    "Options of commands that read backups",
    "Options of commands on a domain",
    "Options of commands that change a domain",
    "Options of commands that freeze",
)
ITS_OWN = {"--help"}


def commands() -> Mapping[str, Any]:
    """Every command by its words, those of groups too (``snapshot create``)."""
    found: dict[str, Any] = {}
    for name, command in command_line().commands.items():
        group = getattr(command, "commands", None)
        found |= {name: command} if group is None else {f"{name} {one}": group[one] for one in group}
    return found


def real_options(command: Any) -> set[tuple[str, ...]]:
    """Names and metavariable of each option."""
    found = set()
    for option in command.params:
        if option.param_type_name == "option" and not ITS_OWN & set(option.opts):
            long, *short = sorted(option.opts, key=len, reverse=True)
            found.add((f"{long} {option.metavar}" if option.metavar else long, *short))
    return found


def documented_options(body: str) -> set[tuple[str, ...]]:
    return {tuple(plain(name) for name in named(row[0])) for row in rows(body)}


def shared_options(parts: Mapping[str, str], command: str) -> set[tuple[str, ...]]:
    found = documented_options(parts[EVERYWHERE])
    for heading in SHARED:
        if command in named(parts[heading].partition("\n|")[0]):
            found |= documented_options(parts[heading])
    return found


def check_options(text: str) -> list[str]:
    parts = sections(text)
    problems = differences("section", parts.keys() & commands().keys(), commands())
    for heading in SHARED:
        sharing = named(parts[heading].partition("\n|")[0])
        problems += [f"{heading}: there is no command {name}" for name in sharing if name not in commands()]
    for name, command in commands().items():
        documented = documented_options(parts.get(name, "")) | shared_options(parts, name)
        problems += differences(name, documented, real_options(command))
    root = {("--version",), ("--help",)}
    return problems + differences("pullback", documented_options(parts["Options of pullback"]), root)


def check_defaults(text: str) -> list[str]:
    parts = sections(text)
    problems = []
    for name, command in commands().items():
        defaults = {option.opts[0]: option.default for option in command.params}
        for row in rows(parts.get(name, "")):
            real = defaults.get(named(row[0])[0].partition(" ")[0])
            if isinstance(real, int | float | str) and not isinstance(real, bool) and plain(row[1]) != str(real):
                problems.append(f"{name} {row[0]}: the default is {real}")
    return problems


def shown_commands(text: str) -> list[list[str]]:
    """Command lines of ``pullback`` in code blocks, split into words."""
    lines = [line.strip().removeprefix("$ ") for block in code_blocks(text) for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"pullback \w", line)]


def named_command(words: list[str]) -> tuple[str, list[str]]:
    """Which command these words are, and what is given to it."""
    length = 2 if " ".join(words[:2]) in commands() else 1
    return " ".join(words[:length]), words[length:]


def check_shown_commands(text: str) -> list[str]:
    problems = []
    for words in shown_commands(text):
        name, given = named_command(words)
        try:
            commands()[name].make_context(name, given)
        except (KeyError, typer.BadParameter.__bases__[0]) as error:
            problems.append(f"pullback {' '.join(words)}: {error}")
    return problems


def test_every_command_and_option_is_documented() -> None:
    assert not check_options(page("cli.md"))
    assert not check_defaults(page("cli.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_that_are_shown_can_be_given(path: Path) -> None:
    assert not check_shown_commands(path.read_text())


def test_every_command_is_shown_once_where_all_are_listed() -> None:
    first = code_blocks(page("cli.md"))[0]
    assert sorted(named_command(words)[0] for words in shown_commands(f"```\n{first}```\n")) == sorted(commands())


def test_the_readme_shows_every_group_of_commands() -> None:
    shown = {words[0] for words in shown_commands((ROOT / "README.md").read_text())}
    assert not differences("group", shown, {name.split()[0] for name in commands()})


# -- configuration ------------------------------------------------------------------------------------------------


def known_keys(tmp_path: Path, table: str) -> set[str]:
    """What the program itself says may stand in a table."""
    path = tmp_path / "wrong.toml"
    path.write_text(f"[{table}]\nnonsense = 1\n")
    with pytest.raises(errors.UsageError, match="nonsense") as caught:
        load_config(str(path))
    return set(str(caught.value).partition("there are ")[2].partition(")")[0].split(", "))


def check_configuration(text: str, repository: set[str], domain: set[str]) -> list[str]:
    real = {f"repository.{key}" for key in repository} | {f"domain.NAME.{key}" for key in domain}
    return differences("key", [plain(row[0]) for row in rows(sections(text)["The file"])], real)


def variables_read() -> set[str]:
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    return set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)["']""", source))


def check_variables(text: str) -> list[str]:
    documented = {name for row in rows(sections(text)["Environment"]) for name in named(row[0])}
    elsewhere = {"AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}  # read by obstore
    return differences("variable", documented - elsewhere, variables_read())


def test_every_configuration_key_is_documented(tmp_path: Path) -> None:
    repository, domain = known_keys(tmp_path, "repository"), known_keys(tmp_path, "domain.web")
    assert not check_configuration(page("configuration.md"), repository, domain)
    assert check_configuration(page("configuration.md"), repository | {"colour"}, domain)


def test_the_configuration_that_is_shown_can_be_used(tmp_path: Path) -> None:
    (block,) = code_blocks(page("configuration.md"), "toml")
    path = tmp_path / "config.toml"
    path.write_text(block)
    config = load_config(str(path))
    assert config.repository.location == "/srv/backup"
    assert find_domain("web", config).disks == ("vda", "vdb")
    assert find_domain("old", config).images == "vda=/srv/old/disk.qcow2"


def test_every_variable_is_documented() -> None:
    assert not check_variables(page("configuration.md"))


# -- dependencies -------------------------------------------------------------------------------------------------


def requirements(lines: Iterable[str]) -> set[tuple[str, str]]:
    return {re.match(r"([\w.-]+)(.*)", line).groups() for line in lines}  # type: ignore[union-attr,misc]


def debian_packages() -> set[str]:
    script = (ROOT / "scripts" / "setup").read_text()
    pairs = re.findall(r"^    ((?:[\w.-]+:[\w.+-]+ ?)+)$", script, flags=re.MULTILINE)
    packages = {pair.partition(":")[2] for line in pairs for pair in line.split()}
    extra = set(re.findall(r"missing\+=\(([\w -]+)\)", script)[0].split())
    return packages | extra | {guest.META_PACKAGE}


def check_dependencies(text: str) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run = requirements(project["dependencies"]) | {("python", project["requires-python"])}
    parts = sections(text)
    return [
        *differences("to run", [(row[0], row[1]) for row in rows(parts["To run"])], run),
        *differences(
            "to develop",
            [(row[0], row[1]) for row in rows(parts["To develop"])],
            requirements(project["optional-dependencies"]["dev"]),
        ),
        *differences("Debian", [row[0] for row in rows(parts["Debian packages"])], debian_packages()),
        *[f"{row[0]} has no reason" for row in rows(text) if len(row[-1]) < 5],
    ]


def test_every_dependency_is_documented() -> None:
    assert len(debian_packages()) > 10
    assert not check_dependencies(page("dependencies.md"))


# -- links, figures -----------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def check_links(path: Path, text: str) -> list[str]:
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            problems.append(f"{path.name}: {link} leads nowhere")
        elif anchor and anchor not in map(slug, sections(target.read_text())):
            problems.append(f"{path.name}: {link} names no heading")
    return problems


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    assert not check_links(path, path.read_text())


def test_the_readme_links_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))
    assert not differences("page", linked, [path.name for path in DOCS.glob("*.md")])


def test_figures_are_those_of_the_program() -> None:
    text = page("how-a-backup-works.md")
    assert f"slower\nthan {CBW_TIMEOUT} s" in text
    assert f"chunks of {CHUNK >> 10} KiB, or of {HOT_CHUNK >> 10} KiB" in text
    assert f"one in {WIDELY} of a segment's chunks" in text
    assert f"Segments of {SEGMENT >> 20} MiB" in text
    assert f"{SAMPLE:,} of each disk" in text
    proof = " ".join(text.partition("## Proof")[2].split())
    for one_in, chance in (("100", "99.997"), ("200", "99.4"), ("1,000", "64")):
        assert re.search(rf"one in {one_in} [^,]*with (a chance of )?{chance} %", proof)
        found = 100 * (1 - (1 - 1 / int(one_in.replace(",", ""))) ** SAMPLE)
        assert abs(found - float(chance)) < 0.5 * 10 ** -len(chance.partition(".")[2])


# -- the worked example -------------------------------------------------------------------------------------------


@needs_restic
def test_restoring_with_restic_alone_works_as_documented(tmp_path: Path, bare_qemu: Callable[..., BareQemu]) -> None:
    text = page("repository.md").partition("<!-- tests/unit/test_docs.py runs this block -->\n")[2]
    block = code_blocks(text, "sh")[0]
    stage = Stage(tmp_path)
    disk = stage.disk("vda", SEGMENT + 3 * MIB)
    qemu = bare_qemu([disk], name="web", running=True)
    qemu.device_write("vda", MIB, 64 << 10, os.urandom(64 << 10))
    stage.backup(qemu)
    qemu.device_write("vda", SEGMENT + MIB, 64 << 10, os.urandom(64 << 10))
    stage.backup(qemu)
    qemu.device_flush("vda")
    environment = {**stage.restic.environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (here := tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        ["bash", "-euc", block], cwd=here, env=environment, check=False, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert images.compare(here / "vda.qcow2", disk.path)
    assert (here / "vda.raw").stat().st_size == SEGMENT + 3 * MIB
    assert {path.name for path in (here / "out" / "web" / "vda").iterdir()} == {"0000", "0001"}


# -- the checks can fail ------------------------------------------------------------------------------------------

ALTERED: list[tuple[Callable[[str], list[str]], str, str, str]] = [
    (check_exit_codes, "exit-codes.md", "| 9 | `TargetExists`", "| 8 | `TargetExists`"),
    (check_exit_codes, "exit-codes.md", "| 130 | |", "| 131 | |"),
    (check_exit_codes, "exit-codes.md", "`Refused`", "`Reused`"),
    (
        check_event_classes,
        "json.md",
        "| `paused_ms` | number | for how many milliseconds the domain stood still; 0",
        "",
    ),
    (check_event_classes, "json.md", "| `done` | integer", "| `made` | integer"),
    (check_event_classes, "json.md", "## note", "## remark"),
    (lambda text: check_object(text, "error", {"event": "error", "message": "", "exit_code": "1"}), "json.md", "", ""),
    (lambda text: check_object(text, "error", {"event": "error", "message": ""}), "json.md", "", ""),
    (lambda text: check_manifest_fields(text, DiskEntry), "repository.md", "| `bytes_zero` |", "| `zero` |"),
    (lambda text: check_manifest_fields(text, Manifest), "repository.md", "| `format` |", "| `version` |"),
    (check_options, "cli.md", "| `--full` |", "| `--whole` |"),
    (check_options, "cli.md", "`--repo LOCATION`, `-r`", "`--repo LOCATION`"),
    (check_options, "cli.md", "--keep-checkpoints N", "--keep-checkpoints M"),
    (check_options, "cli.md", "## list", "## show"),
    (check_defaults, "cli.md", "| `--keep-checkpoints N` | 4 |", "| `--keep-checkpoints N` | 5 |"),
    (check_shown_commands, "cli.md", "$ pullback backup qmp:", "$ pullback backup --quick qmp:"),
    (check_shown_commands, "cli.md", "$ pullback backup qmp:", "$ pullback save qmp:"),
    (check_variables, "configuration.md", "| `PULLBACK_CONFIG` | the", "| `PULLBACK_CONF` | the"),
    (check_dependencies, "dependencies.md", "| typer | >=0.15,<0.29 |", "| typer | >=0.15,<0.30 |"),
    (check_dependencies, "dependencies.md", "| nbdkit |", "| nbdkitten |"),
    (check_dependencies, "dependencies.md", "| types |", "| |"),
    (lambda text: check_links(DOCS / "json.md", text), "json.md", "(exit-codes.md)", "(exit-code.md)"),
    (lambda text: check_links(DOCS / "json.md", text), "json.md", "#the-manifest", "#the-manifesto"),
]


@pytest.mark.parametrize("number", range(len(ALTERED)))
def test_a_check_finds_what_was_altered(number: int) -> None:
    check, name, old, new = ALTERED[number]
    text = page(name)
    assert old in text
    assert check(text.replace(old, new, 1))
