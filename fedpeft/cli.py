"""The command line. Heavy libraries are imported by the commands that need them, so that help is instant."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedpeft import __version__
from fedpeft.cli_help import SectionedGroup, build_command
from fedpeft.errors import FedPEFTError, RunFileError, StorageError, UsageError
from fedpeft.runtime.child_environment import LIBRARY_DEFAULTS
from fedpeft.runtime.console import (
    INTERRUPTED,
    clean_interrupts,
    drop_output,
    end_at_once_when_interrupted,
    flush_output,
    interruption,
    output_problem,
    replace_unshown_signs,
    was_interrupted,
)
from fedpeft.runtime.safe_text import one_line

if TYPE_CHECKING:
    from pydantic import BaseModel

# Before any library that would read them: telemetry and progress bars are off unless the user turned them on.
for _name, _value in LIBRARY_DEFAULTS.items():
    os.environ.setdefault(_name, _value)

app = typer.Typer(
    name="fedpeft",
    cls=SectionedGroup,
    help="Fine-tune a large pretrained model together without sharing data.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunFile = Annotated[
    Path | None, typer.Argument(metavar="[RUN.toml]", help="Run file; without one, the embedded demo.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the run file, e.g. training.lr=1e-4; without a value the key is taken out.",
    ),
]


@app.command()
def simulate(
    run_file: RunFile = None,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run [default: runs/NAME].")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="With --resume: where the training rows lie now, if they moved."),
    ] = None,
    test_data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="With --resume: where the test rows lie now, if they moved."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is already in --out.")] = False,
    workers: Annotated[
        int, typer.Option(min=0, help="Worker processes; 0: one per core. The result is the same.")
    ] = 0,
    engine: Annotated[str, typer.Option(help="local, or ray for Flower's simulation engine.")] = "local",
    baselines: Annotated[
        bool | None,
        typer.Option(
            "--baselines/--no-baselines", help="Compare with zero-shot, clients alone and pooled data."
        ),
    ] = None,
    memory_check: Annotated[
        bool,
        typer.Option("--memory-check/--no-memory-check", help="Refuse a run that is predicted not to fit."),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per line, for machines.")
    ] = False,
) -> None:
    """Fine-tune across simulated clients on this machine; out come an adapter and a report."""
    from fedpeft.commands.simulate import simulate_command

    overrides = list(set_ or [])
    if baselines is not None:
        overrides.append(f"evaluation.baselines={str(baselines).lower()}")
    if quiet and json_:
        raise UsageError("--quiet and --json exclude each other; give one")
    simulate_command(
        run_file,
        overrides,
        out=out,
        resume=resume,
        data=data,
        test_data=test_data,
        force=force,
        workers=workers or _cores(),
        engine=engine,
        progress="quiet" if quiet else "json" if json_ else "rich",
        memory_check=memory_check,
    )


@app.command()
def plan(
    run_file: RunFile = None,
    set_: Overrides = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Propose settings that fit in so much memory, such as 8GB; loads no model."
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a run would cost and what would be refused, without training."""
    from fedpeft.commands.plan import fit_command, plan_command

    if fit is not None:
        fit_command(run_file, list(set_ or []), fit, as_json=json_)
        return
    plan_command(run_file, list(set_ or []), as_json=json_)


@app.command()
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or a run folder with one.")],
    run_file: Annotated[
        Path | None, typer.Option("--run", help="Run file with model and data [default: the adapter's run].")
    ] = None,
    set_: Overrides = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure an adapter on a run's test set."""
    from fedpeft.commands.evaluate import evaluate_command

    evaluate_command(adapter, run_file, list(set_ or []), as_json=json_)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or a run folder with one.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapter into the base and write a full model.")
    ] = False,
    run_file: Annotated[
        Path | None, typer.Option("--run", help="Run file with the model [default: the adapter's run].")
    ] = None,
    set_: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
) -> None:
    """Write an adapter, or base and adapter merged, to a folder of its own."""
    from fedpeft.commands.export import export_command

    export_command(adapter, out, merge=merge, run_file=run_file, overrides=list(set_ or []), force=force)


@app.command()
def compress(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or a run folder with one.")],
    out: Annotated[Path, typer.Option(help="File to write, NAME.fpz.")],
    density: Annotated[float, typer.Option(help="Share of weights whose sign is kept.")] = 0.1,
    method: Annotated[
        str,
        typer.Option(help="ternary: each tensor, its mean kept size; compeft: all as one, alpha deviations."),
    ] = "ternary",
    alpha: Annotated[
        str | None,
        typer.Option(help="For --method compeft; search: the best one on the clients' held-out rows."),
    ] = None,
    run_file: Annotated[
        Path | None, typer.Option("--run", help="Run file for --alpha search [default: the adapter's run].")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Compress the weights, not their change since the run began.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write an adapter as a file some twenty times smaller: signs of the largest changes, and scales."""
    from fedpeft.commands.compress import compress_command

    compress_command(
        adapter, out, density=density, method=method, alpha=alpha, raw=raw, force=force, run_file=run_file
    )


@app.command()
def decompress(
    expert: Annotated[Path, typer.Argument(help="File that compress wrote, NAME.fpz.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    init: Annotated[
        Path | None,
        typer.Option(help="Run folder whose start to use [default: drawn again on the base model]."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
) -> None:
    """Write a compressed adapter as a folder that peft loads."""
    from fedpeft.commands.compress import decompress_command

    decompress_command(expert, out, init=init, force=force)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders, run folders or .fpz files.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    method: Annotated[
        str, typer.Option(help="average, task-arithmetic, ties, dare, lines, pcb or breadcrumbs.")
    ] = "average",
    weights: Annotated[str | None, typer.Option(help="One number per adapter, such as 2,1,1.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=NUMBER", help="A coefficient of the method, e.g. lam=0.5."),
    ] = None,
    run_file: Annotated[
        Path | None, typer.Option("--run", help="Run file with the held-out rows for --select.")
    ] = None,
    select: Annotated[
        bool, typer.Option("--select", help="Choose the coefficients on the clients' held-out rows.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
) -> None:
    """Merge adapters of one base into one."""
    from fedpeft.commands.merge import merge_command

    merge_command(
        adapters,
        out,
        method=method,
        weights=weights,
        options=list(set_ or []),
        run_file=run_file,
        select=select,
        force=force,
    )


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run in seed space.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
) -> None:
    """Rebuild a seed-space run's full model from its base and the run's few integers."""
    from fedpeft.commands.replay import replay_command

    replay_command(run, out, force=force)


@app.command()
def emulator(
    base: Annotated[str, typer.Argument(help="Folder or hub name of the full model.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    task: Annotated[str, typer.Option(help="causal-lm or sequence-classification.")] = "causal-lm",
    pad: Annotated[int, typer.Option(help="First and last layers that clients train, each.")] = 2,
    middle: Annotated[int, typer.Option(help="Layers between them that stay, evenly spaced.")] = 4,
    distil: Annotated[
        int, typer.Option(metavar="STEPS", help="Teach the middle to stand for what was left out.")
    ] = 0,
    text: Annotated[Path | None, typer.Option(help="Public text for --distil, a line each.")] = None,
    seed: Annotated[int, typer.Option(help="Of what --distil draws.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
) -> None:
    """Make a smaller model for offsite tuning, whose middle layers clients never see in full."""
    from fedpeft.commands.emulator import Distilling, emulator_command

    if (distil > 0) != (text is not None):
        raise UsageError("--distil STEPS and --text FILE belong together; give both or neither")
    how = None if text is None else Distilling(distil, text, seed)
    emulator_command(base, out, task=task, pad=pad, middle=middle, distilling=how, force=force)


@app.command("plug-in")
def plug_in(
    adapter: Annotated[Path, typer.Argument(help="Adapter trained on an emulator, or its run folder.")],
    emulator: Annotated[Path, typer.Option(help="Folder of the emulator.")],
    base: Annotated[str, typer.Option(help="The full model that the emulator was made from.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
) -> None:
    """Turn an adapter that was trained on an emulator into one of the full model."""
    from fedpeft.commands.emulator import plug_in_command

    plug_in_command(adapter, emulator, base, out, force=force)


@app.command()
def methods(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List what a run file can name: PEFT methods, strategies, stages, metrics and the rest."""
    from fedpeft.commands.methods import methods_command

    methods_command(as_json=json_)


@app.command()
def keys(
    place: Annotated[
        str | None,
        typer.Argument(metavar="[SECTION]", help="A table or a key, e.g. federation.buffer or training.lr."),
    ] = None,
    of: Annotated[str, typer.Option(metavar="FILE", help="run, server or client: whose keys.")] = "run",
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the file's JSON schema, for editors.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Explain the keys of a run file, of server.toml or of client.toml, with units and defaults."""
    from fedpeft.commands.keys import keys_command

    if of not in _FILE_MODELS:
        raise UsageError(f"--of {of} came; give {', '.join(_FILE_MODELS)}")
    if schema and (json_ or place):
        raise UsageError("--schema prints the schema of the whole file; leave out --json and SECTION")
    keys_command(_FILE_MODELS[of](), place, as_schema=schema, as_json=json_)


def _run_model() -> type[BaseModel]:
    from fedpeft.config.sections import RunConfig

    return RunConfig


def _server_model() -> type[BaseModel]:
    from fedpeft_server.ops.server_settings import ServerSettings

    return ServerSettings


def _client_model() -> type[BaseModel]:
    from fedpeft_client.client_settings import ClientSettings

    return ClientSettings


_FILE_MODELS = {"run": _run_model, "server": _server_model, "client": _client_model}
"""What `fedpeft keys --of` takes."""


@app.command()
def provision(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the federation's keys.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Host name or IP address that agents dial; may be repeated. Makes DIR."),
    ] = None,
    agent: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A device that trains.")] = None,
    submitter: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Someone who submits and watches runs.")
    ] = None,
    admin: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Someone who also invites and revokes.")
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Print one-time tokens instead of making folders with keys.")
    ] = False,
    token_days: Annotated[
        float, typer.Option(min=0.001, max=30.0, help="Days that a token can be used.")
    ] = 7.0,
    renew_server: Annotated[
        bool, typer.Option("--renew-server", help="New key and certificate for the server.")
    ] = False,
    revoke: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Revoke what a name holds; may be repeated.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a federation's certificates: authority, server, agents, admins; add, renew, revoke, list."""
    from datetime import timedelta

    from fedpeft.commands.provision import ProvisionRequest, members_named, provision_command

    asked = ProvisionRequest(
        hosts=host or [],
        members=members_named(agent or [], submitter or [], admin or []),
        tokens=tokens,
        token_life=timedelta(days=token_days),
        renew_server=renew_server,
        revoke=revoke or [],
    )
    provision_command(folder, asked, as_json=json_)


audit_app = typer.Typer(no_args_is_help=True, help="Check what a run promises.", rich_markup_mode=None)
app.add_typer(audit_app, name="audit")


@audit_app.callback()
def audit() -> None:
    """Check what a run promises."""


@audit_app.command()
def sensitivity(
    run_file: RunFile = None,
    set_: Overrides = None,
    data: Annotated[
        Path | None, typer.Option(help="File or folder of records [default: those that the run file names].")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Records that are drawn of them.")] = 16,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Records (or persons) that are left out, one after the other.")
    ] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Of both draws.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how far one record (or person) moves a private training step; end with 10 beyond the bound."""
    from fedpeft.commands.audit import sensitivity_command

    sensitivity_command(
        run_file,
        list(set_ or []),
        data=data,
        rows=rows,
        neighbours=neighbours,
        seed=seed,
        as_json=json_,
    )


MetricsAddress = Annotated[
    str | None,
    typer.Option("--metrics", metavar="HOST:PORT", help="Numbers for Prometheus, over plain HTTP."),
]

client_app = typer.Typer(
    help="Be an agent: train on this device's rows for a server's runs.", rich_markup_mode=None
)
app.add_typer(client_app, name="client")


@client_app.callback(invoke_without_command=True)
def client(
    context: typer.Context,
    server: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="The server to dial.")] = None,
    data: Annotated[Path | None, typer.Option(help="This device's rows; they never leave it.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="client.toml: these options, and the owner's policy.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name in the federation [default: the certificate's].")
    ] = None,
    token: Annotated[
        str,
        typer.Option(envvar="FEDPEFT_TOKEN", show_envvar=False, help="One-time token, or $FEDPEFT_TOKEN."),
    ] = "",
    keys: Annotated[
        Path | None, typer.Option(help="Folder with key and certificate [default: HOME/keys].")
    ] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of state [default: ~/.fedpeft/NAME].")] = None,
    model: Annotated[
        str | None, typer.Option(help="This device's copy of the base model [default: the run file's].")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="What to train on: auto, cpu, cuda or cuda:N [default: auto].")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plaintext, to a server on this very machine.")
    ] = False,
    metrics: MetricsAddress = None,
) -> None:
    """Be an agent: train on this device's rows for a server's runs."""
    if context.invoked_subcommand is not None:
        return
    from fedpeft_client.commands.client_command import client_command

    given = {"server": server, "data": data, "name": name, "keys": keys, "home": home, "model": model}
    given |= {"device": device, "metrics": metrics}
    stated: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    client_command(config, stated | ({"insecure": True} if insecure else {}), token)


@client_app.command("ledger")
def client_ledger(
    home: Annotated[Path | None, typer.Option(help="Folder of the agent's state.")] = None,
    name: Annotated[str, typer.Option(help="The agent, if several were started here.")] = "",
    last: Annotated[int, typer.Option(min=0, help="So many messages, the last ones.")] = 20,
    json_: Annotated[bool, typer.Option("--json", help="Print every message as a JSON object.")] = False,
) -> None:
    """Print what left this device: every metric, count and byte."""
    from fedpeft_client.commands.client_command import client_ledger_command

    client_ledger_command(home, name, as_json=json_, last=last)


@client_app.command("status")
def client_status(
    home: Annotated[Path | None, typer.Option(help="Folder of the agent's state.")] = None,
    name: Annotated[str, typer.Option(help="The agent, if several were started here.")] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an agent did here and what it has spent."""
    from fedpeft_client.commands.client_command import client_status_command

    client_status_command(home, name, as_json=json_)


run_app = typer.Typer(
    no_args_is_help=True, help="Runs on a server: submit, list, show, logs, stop, pull, remove."
)
app.add_typer(run_app, name="run")

ServerAddress = Annotated[
    str, typer.Option("--server", envvar="FEDPEFT_SERVER", metavar="HOST:PORT", help="The server to ask.")
]
OwnKeys = Annotated[
    Path | None,
    typer.Option(
        "--keys",
        envvar="FEDPEFT_KEYS",
        metavar="DIR",
        help="Your folder of key and certificate; without it plaintext, to this machine only.",
    ),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as submit and list print it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
LOCAL_SERVER = "127.0.0.1:9440"
ServerConfig = Annotated[
    Path | None, typer.Option("--config", metavar="server.toml", help="The server's settings.")
]
ServerState = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="Folder of runs and updates [default: fedpeft-state]."),
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        envvar="FEDPEFT_DATABASE",
        metavar="URL",
        help="SQLAlchemy URL [default: a file in --state].",
    ),
]
WithKeys = Annotated[
    bool, typer.Option("--with-keys", help="Also the certificates' folders that --config names.")
]


server_app = typer.Typer(help="Hold runs for agents that connect, until told to end.", rich_markup_mode=None)
app.add_typer(server_app, name="server")


@server_app.callback(invoke_without_command=True)
def server(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="server.toml", help="Settings; options given here go over them.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where to listen [default: 127.0.0.1:9440].")
    ] = None,
    state: ServerState = None,
    database: DatabaseUrl = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The server's folder that provision made.")
    ] = None,
    authority: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The authority's folder, if devices enrol here.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plaintext, for agents on this very machine.")
    ] = False,
    root: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="A folder whose files submitters' run files may name; may be repeated [default: none].",
        ),
    ] = None,
    metrics: MetricsAddress = None,
    migrate: Annotated[
        bool, typer.Option("--migrate", help="Bring the database of an older version up to date first.")
    ] = False,
) -> None:
    """Hold runs for agents that connect, until told to end; a killed server goes on at its next start."""
    if context.invoked_subcommand is not None:
        return
    from fedpeft_server.ops.server_command import server_command

    given = {
        "listen": listen,
        "state": state,
        "database": database,
        "insecure": insecure or None,
        "roots": root or None,
        "tls": {"keys": keys, "authority": authority},
        "metrics": {"address": metrics},
    }
    raise typer.Exit(server_command(config, given, migrate=migrate))


@server_app.command("backup")
def server_backup(
    out: Annotated[Path, typer.Argument(metavar="FILE.tar", help="File to write, with all of the state.")],
    config: ServerConfig = None,
    state: ServerState = None,
    database: DatabaseUrl = None,
    with_keys: WithKeys = False,
    json_: AsJson = False,
) -> None:
    """Write a server's whole state to one file; the server may run meanwhile."""
    from fedpeft_server.ops.server_command import backup_command

    given = {"state": state, "database": database}
    backup_command(out, config, given, with_keys=with_keys, as_json=json_)


@server_app.command("restore")
def server_restore(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar", help="What backup wrote.")],
    config: ServerConfig = None,
    state: ServerState = None,
    database: DatabaseUrl = None,
    with_keys: WithKeys = False,
    nothing_since: Annotated[
        bool,
        typer.Option("--nothing-since", help="No round was closed after the backup: private runs go on too."),
    ] = False,
    json_: AsJson = False,
) -> None:
    """Put a backup where no state is, after checking every byte of it."""
    from fedpeft_server.ops.server_command import restore_command

    given = {"state": state, "database": database}
    restore_command(file, config, given, with_keys=with_keys, nothing_since=nothing_since, as_json=json_)


@server_app.command("audit")
def server_audit(
    config: ServerConfig = None,
    state: ServerState = None,
    database: DatabaseUrl = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Print no entries; say whether all are as they were written.")
    ] = False,
    known: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBER:DIGEST",
            help="An entry as an earlier call or a log named it, which has to be there; may be repeated.",
        ),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Print who did what on a server, from its state here, and whether an entry is missing or changed."""
    from fedpeft_server.ops.audit_command import audit_command

    given = {"state": state, "database": database}
    audit_command(config, given, known or [], entries=not verify, as_json=json_)


MemberName = Annotated[str, typer.Argument(metavar="NAME", help="A device's or a person's name.")]


@server_app.command("invite")
def server_invite(
    name: MemberName,
    role: Annotated[str, typer.Option(help="agent, submitter or admin.")] = "agent",
    days: Annotated[float, typer.Option(min=0.001, max=30.0, help="Days that the token can be used.")] = 7.0,
    server: ServerAddress = LOCAL_SERVER,
    keys: OwnKeys = None,
    json_: AsJson = False,
) -> None:
    """Print a one-time token for a new member of the server's federation; for admins."""
    from fedpeft_client.commands.member_commands import invite_command
    from fedpeft_client.transport.admin_client import AdminClient

    invite_command(AdminClient(server, keys), name, role, max(1, round(days * 86_400)), as_json=json_)


@server_app.command("revoke")
def server_revoke(
    name: MemberName,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the audit log.")] = "",
    server: ServerAddress = LOCAL_SERVER,
    keys: OwnKeys = None,
    json_: AsJson = False,
) -> None:
    """End what a name may do, at once, its open session too; for admins."""
    from fedpeft_client.commands.member_commands import revoke_command
    from fedpeft_client.transport.admin_client import AdminClient

    revoke_command(AdminClient(server, keys), name, reason, as_json=json_)


@server_app.command("status")
def server_status(server: ServerAddress = LOCAL_SERVER, keys: OwnKeys = None, json_: AsJson = False) -> None:
    """Say who is connected to a server, what each used, and what was refused and why."""
    from fedpeft_client.commands.server_status import server_status_command
    from fedpeft_client.transport.admin_client import AdminClient

    server_status_command(AdminClient(server, keys), as_json=json_)


@run_app.command("submit")
def run_submit(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="Run file.")],
    server: ServerAddress = LOCAL_SERVER,
    keys: OwnKeys = None,
    set_: Overrides = None,
    min_agents: Annotated[
        int,
        typer.Option(
            min=0, show_default=False, help="Begin with so many agents [default: the run file's clients]."
        ),
    ] = 0,
    agent: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Ask this agent only; may be repeated.")
    ] = None,
    wait_s: Annotated[
        int, typer.Option(min=0, help="Fail if they are not there after so many seconds; 0: wait on.")
    ] = 0,
    reader: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A submitter who may read the run too; may be repeated; '*': all. Default: admins alone.",
        ),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Queue a run on a server; prints its id. It is yours: others don't see it unless you name them."""
    from fedpeft_client.commands.run_commands import Rules, submit_command
    from fedpeft_client.transport.admin_client import AdminClient

    rules = Rules(min_agents=min_agents, agents=agent or [], wait_s=wait_s)
    submit_command(AdminClient(server, keys), run_file, list(set_ or []), rules, reader or [], as_json=json_)


@run_app.command("list")
def run_list(
    server: ServerAddress = LOCAL_SERVER,
    keys: OwnKeys = None,
    limit: Annotated[int, typer.Option(min=0, help="The newest so many; 0: all.")] = 0,
    json_: AsJson = False,
) -> None:
    """List the runs on a server that you may read."""
    from fedpeft_client.commands.run_commands import list_command
    from fedpeft_client.transport.admin_client import AdminClient

    list_command(AdminClient(server, keys), limit=limit, as_json=json_)


@run_app.command("show")
def run_show(
    run: RunId, server: ServerAddress = LOCAL_SERVER, keys: OwnKeys = None, json_: AsJson = False
) -> None:
    """Show how a run stands."""
    from fedpeft_client.commands.run_commands import show_command
    from fedpeft_client.transport.admin_client import AdminClient

    show_command(AdminClient(server, keys), run, as_json=json_)


@run_app.command("logs")
def run_logs(
    run: RunId,
    server: ServerAddress = LOCAL_SERVER,
    keys: OwnKeys = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    json_: AsJson = False,
) -> None:
    """Print a run's log."""
    from fedpeft_client.commands.run_commands import logs_command
    from fedpeft_client.transport.admin_client import AdminClient

    logs_command(AdminClient(server, keys), run, follow=follow, as_json=json_)


@run_app.command("stop")
def run_stop(
    run: RunId,
    server: ServerAddress = LOCAL_SERVER,
    keys: OwnKeys = None,
    reason: Annotated[str, typer.Option(help="Why, for whoever looks at it later.")] = "",
    json_: AsJson = False,
) -> None:
    """End a run for good; what it has reached can be pulled."""
    from fedpeft_client.commands.run_commands import stop_command
    from fedpeft_client.transport.admin_client import AdminClient

    stop_command(AdminClient(server, keys), run, reason, as_json=json_)


@run_app.command("pull")
def run_pull(
    run: RunId,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write [default: runs/RUN].")
    ] = None,
    server: ServerAddress = LOCAL_SERVER,
    keys: OwnKeys = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in --out.")] = False,
    json_: AsJson = False,
) -> None:
    """Write a run's adapter, report and rows to a folder here; of one that goes on, its last round's."""
    from fedpeft_client.commands.run_commands import pull_command
    from fedpeft_client.transport.admin_client import AdminClient

    pull_command(AdminClient(server, keys), run, out or Path("runs") / run, force=force, as_json=json_)


@run_app.command("remove")
def run_remove(
    run: RunId, server: ServerAddress = LOCAL_SERVER, keys: OwnKeys = None, json_: AsJson = False
) -> None:
    """Delete an ended run's files on the server; its log and its line in the list stay."""
    from fedpeft_client.commands.run_commands import remove_command
    from fedpeft_client.transport.admin_client import AdminClient

    remove_command(AdminClient(server, keys), run, as_json=json_)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedpeft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def _say_error(text: str) -> None:
    """Print one line on standard error; what a file or another machine put into it acts on no terminal."""
    typer.echo(f"error: {one_line(text)}", err=True)


def _terminate(signum: int, frame: object) -> None:
    """End by an exception, so that the terminal is put back and worker processes are ended."""
    sys.exit(128 + signum)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors become lines on stderr and their own exit code; Ctrl-C ends with 130.

    Raises:
        SystemExit: always, with the exit code; see `fedpeft.errors`.
    """
    signal.signal(signal.SIGTERM, _terminate)
    replace_unshown_signs()
    with clean_interrupts():
        code = end_cleanly(lambda: _exit_code(arguments))
    if arguments is None:  # a process of its own, which now ends
        end_at_once_when_interrupted()
    sys.exit(code)


def end_cleanly(run: Callable[[], int]) -> int:
    """Return the exit code of a command, once all output is written or said not to be."""
    try:
        code = run()
        flush_output()
    except KeyboardInterrupt:  # outside the command itself
        return _exit_interrupted()
    except OSError as error:
        line, closed = output_problem(error)
        drop_output()
        if line:
            _say_error(line)
        return StorageError.exit_code if closed is None else closed
    except Exception:
        if not was_interrupted():  # an import that is interrupted can end in a RuntimeError of Python's own
            raise
        return _exit_interrupted()
    return code


def _exit_interrupted() -> int:
    typer.echo(interruption(), err=True)
    return INTERRUPTED


def _exit_code(arguments: list[str] | None) -> int:
    try:
        code = build_command(app).main(arguments, prog_name="fedpeft", standalone_mode=False)
        if code == INTERRUPTED:  # typer's own way of ending after Ctrl-C
            return _exit_interrupted()
        return code if isinstance(code, int) else 0
    except RunFileError as error:
        for problem in error.problems:
            _say_error(f"{error.source}: {problem}")
        return error.exit_code
    except FedPEFTError as error:
        _say_error(str(error))
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        return UsageError.exit_code
    except click.ClickException as error:
        hinted = "Did you mean" in error.message  # by typer, and click would say it once more
        typer.echo(f"error: {error.message if hinted else error.format_message()}", err=True)
        return UsageError.exit_code


if __name__ == "__main__":
    main()
