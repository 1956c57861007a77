"""What is shipped to run a federation: configs that the programs read, and files that name what exists."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]  # brought by transformers

from fedpeft.cli import app, main
from fedpeft.config.run_file import load_run
from fedpeft.errors import CredentialError, StateError, UsageError
from fedpeft.planning.preflight import problems_of
from fedpeft_client.client_settings import ClientSettings as ClientSettings
from fedpeft_client.client_settings import read_settings as read_client
from fedpeft_server.ops.server_settings import ServerSettings as ServerSettings
from fedpeft_server.ops.server_settings import read_settings as read_server

ROOT = Path(__file__).resolve().parents[2]
SERVER, CLIENT = ROOT / "server", ROOT / "client"
RUN_FILE = SERVER / "three_agents.toml"
DOCKERFILES = (SERVER / "Dockerfile", CLIENT / "Dockerfile")
UNITS = (SERVER / "fedpeft-server.service", CLIENT / "fedpeft-client.service")
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
AGENTS = ("east", "north", "south")
PROFILES = [word for name in ("setup", "postgres", "prometheus") for word in ("--profile", name)]


def is_understood(words: list[str]) -> bool:
    """Whether the command line knows a command with these options; nothing is run.

    Raises:
        click.ClickException: it does not.
    """
    assert words[0] == "fedpeft"
    command, arguments = typer.main.get_command(app), words[1:]
    with command.make_context("fedpeft", list(arguments)) as context:
        while (inner := getattr(command, "commands", {}).get(arguments[0] if arguments else "")) is not None:
            command, arguments = inner, arguments[1:]
            context = command.make_context(command.name, list(arguments), parent=context)
    return True


def keys(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# ---- Configs


def test_the_servers_example_is_read_and_shows_every_key() -> None:
    settings = read_server(SERVER / "server.toml", {})
    shown = dict(keys(tomllib.loads((SERVER / "server.toml").read_text())))
    assert set(shown) == set(dict(keys(settings.model_dump()))) - {"insecure"}


def test_the_servers_example_tells_the_defaults() -> None:
    """What is no default is said to be none."""
    text = (SERVER / "server.toml").read_text()
    defaults = dict(keys(ServerSettings().model_dump(mode="json")))
    for key, value in keys(tomllib.loads(text)):
        name = key.rpartition(".")[2]
        (line,) = (line for line in text.splitlines() if re.match(rf"{name} +=", line))
        assert (value == defaults[key]) == ("default" not in line), line


def test_the_clients_example_is_read(tmp_path: Path) -> None:
    settings = read_client(CLIENT / "client.toml", {"data": tmp_path})
    assert settings.policy.allow_download is False
    assert settings.server.rpartition(":")[2] == ServerSettings().listen.rpartition(":")[2]


def test_what_the_clients_example_suggests_is_read_too() -> None:
    text = (CLIENT / "client.toml").read_text()
    suggested = re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE)
    table = tomllib.loads(suggested)
    assert {"privacy", "max_total_epsilon", "base_digests"} <= set(table["policy"])
    ClientSettings.model_validate(table)


def test_the_run_can_be_submitted_to_the_agents() -> None:
    run = load_run(RUN_FILE)
    assert problems_of(run) == []
    assert run.data.partitioner.clients == len(AGENTS)
    assert isinstance(run.data.train, str)
    assert isinstance(run.data.test, str)
    assert sorted(path.stem for path in Path(run.data.train).iterdir()) == list(AGENTS)
    rows = {name: (CLIENT / "data" / f"{name}.jsonl").read_text().splitlines() for name in AGENTS}
    rows["test"] = Path(run.data.test).read_text().splitlines()
    everything = [row for part in rows.values() for row in part]
    assert len(set(everything)) == len(everything), "different data: nobody holds another's rows"


# ---- docker-compose.yml


def service_words(name: str) -> list[str]:
    """What a container runs: its image's entry point, and the service's own words."""
    service = COMPOSE["services"][name]
    (entry,) = re.findall(r"^ENTRYPOINT \[\"(.+)\"\]$", DOCKERFILES[0].read_text(), re.MULTILINE)
    return [entry, *map(str, service.get("command") or command_of(DOCKERFILES[0]))]


def command_of(dockerfile: Path) -> list[str]:
    """What an image runs without further words."""
    (words,) = re.findall(r"^CMD (\[.+\])$", joined(dockerfile), re.MULTILINE)
    found: list[str] = json.loads(words)
    return found


def joined(path: Path) -> str:
    """The text with continued lines in one."""
    return re.sub(r" *\\\n *", " ", path.read_text())


def mounts(name: str) -> dict[str, str]:
    """Place in the container to place on the host."""
    pairs = (volume.split(":") for volume in COMPOSE["services"][name]["volumes"])
    return {pair[1]: pair[0] for pair in pairs}


def test_there_are_a_server_and_three_agents_with_different_data() -> None:
    data = {name: mounts(name)[f"/data/{name}.jsonl"] for name in AGENTS}
    assert len(set(data.values())) == 3
    assert {"server", *AGENTS} == {name for name, one in COMPOSE["services"].items() if "profiles" not in one}


@pytest.mark.parametrize("name", ["server", *AGENTS])
def test_the_containers_commands_are_understood(name: str) -> None:
    assert is_understood(service_words(name))


def test_every_mounted_file_is_here_or_made_by_provisioning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = COMPOSE["services"]["provision"]["command"][0]
    made, *after = script.split("&&")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(made)[1:])
    assert not ended.value.code
    *here, owner = after
    assert shlex.split(owner)[0] == "chown"  # which only root can
    subprocess.run(["sh", "-ec", "&&".join(here)], check=True, timeout=60)
    password = (tmp_path / "federation/database/password").read_text()
    assert len(password.strip()) >= 32
    assert (tmp_path / "federation/database/passwords").read_text().endswith(f":{password}")
    sources = [source for name in COMPOSE["services"] for source in mounts(name).values()]
    missing = [
        source
        for source in sources
        if not (source in COMPOSE["volumes"] or (ROOT / source).exists() or (tmp_path / source).exists())
    ]
    assert missing == []


def test_what_the_configs_name_is_mounted() -> None:
    words = command_of(DOCKERFILES[0])
    folders = {words[words.index(option) + 1] for option in ("--state", "--keys", "--authority", "--config")}
    assert folders <= set(mounts("server"))
    table = tomllib.loads((CLIENT / "client.toml").read_text())
    for name in AGENTS:
        assert {table["home"], table["keys"]} <= set(mounts(name))
        assert table["server"].partition(":")[0] in COMPOSE["services"]


def test_containers_can_do_little() -> None:
    for name, service in COMPOSE["services"].items():
        if name != "provision":  # which has no network instead
            assert service["read_only"], name
            assert service["cap_drop"] == ["ALL"], name
    assert COMPOSE["services"]["provision"]["network_mode"] == "none"
    assert COMPOSE["networks"]["federation"]["internal"]
    for name in AGENTS:
        assert COMPOSE["services"][name]["networks"] == ["federation"]


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
def test_compose_accepts_the_file() -> None:
    subprocess.run(["docker-compose", *PROFILES, "config", "-q"], cwd=ROOT, check=True, timeout=60)


def test_the_commands_in_the_head_are_understood() -> None:
    lines = re.findall(r"^#   (docker compose .*)$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    people = [shlex.split(line, comments=True)[5:] for line in lines if "--rm people" in line]
    assert len(people) == 3
    assert all(is_understood(["fedpeft", *words]) for words in people)


# ---- Dockerfiles


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=["server", "client"])
def test_an_image_holds_this_project_only_and_runs_as_nobody_special(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()
    ]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, f"{source} would not reach the build"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml"} <= set(copied)
    assert re.findall(r"pip install .*$", text, re.MULTILINE) in (
        ['pip install --no-cache-dir -c requirements.lock ".[postgres]"'],
        ['pip install --no-cache-dir -c requirements.lock ".[quant]"'],
    )
    assert "://" not in text, "no registry is named"
    users = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    assert users == ["fedpeft"]
    assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")
    assert is_understood(["fedpeft", *command_of(dockerfile)])


# ---- systemd units


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capitals
    parser.read_string(joined(path))
    return parser


@pytest.mark.parametrize("path", UNITS, ids=["server", "client"])
def test_a_unit_starts_what_is_here_and_does_not_repeat_what_cannot_mend(path: Path) -> None:
    service = unit(path)["Service"]
    words = shlex.split(service["ExecStart"])
    assert is_understood([Path(words[0]).name, *words[1:]])
    config = Path(words[words.index("--config") + 1])
    assert (path.parent / config.name).is_file(), "the config that it names is an example here"
    for_good = {UsageError.exit_code, StateError.exit_code, CredentialError.exit_code}
    assert set(map(int, service["RestartPreventExitStatus"].split())) == for_good
    assert service["User"] not in ("", "root")


def test_the_server_gets_longer_to_end_than_its_runs() -> None:
    drain_s = read_server(SERVER / "server.toml", {}).drain_s
    assert float(unit(UNITS[0])["Service"]["TimeoutStopSec"]) > drain_s
    assert float(COMPOSE["services"]["server"]["stop_grace_period"].removesuffix("s")) > drain_s


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("path", UNITS, ids=["server", "client"])
def test_systemd_accepts_a_unit_and_finds_it_hardened(path: Path, tmp_path: Path) -> None:
    here = tmp_path / path.name
    here.write_text(path.read_text().replace("/opt/fedpeft/bin/fedpeft", sys.executable))
    checked = subprocess.run(
        ["systemd-analyze", "verify", here], capture_output=True, text=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", here],
        capture_output=True,
        timeout=60,
        check=True,
    )
