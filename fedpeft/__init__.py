"""Federated parameter-efficient fine-tuning: the data stays where it is, a small update travels.

This module is the public Python API. Its names are loaded when they are first used, so that
``import fedpeft`` costs nothing; what is not among them may change with any version.

>>> import fedpeft
>>> result = fedpeft.simulate("run.toml", ["run.rounds=5"], out="runs/first")  # doctest: +SKIP
>>> result.metrics[-1], result.adapter  # doctest: +SKIP
"""

__version__ = "0.1.0"

_HOMES = {
    "api": (
        "Result",
        "Server",
        "attack",
        "check",
        "connect",
        "evaluate",
        "file_format",
        "load_run",
        "lora_rule",
        "metric",
        "peft_method",
        "plan",
        "process_unchanged",
        "resume",
        "simulate",
        "sink",
        "stage",
        "strategy",
        "submit",
    ),
    "config.sections": ("RunConfig", "Section"),
    "config.traits": ("Trait",),
    "errors": (
        "CredentialError",
        "DataError",
        "FedPEFTError",
        "FederationError",
        "MissingExtraError",
        "ModelError",
        "PrivacyError",
        "RunFileError",
        "StateError",
        "StorageError",
        "TrainingError",
        "UpdateError",
        "UsageError",
    ),
    "ledger.records": ("Evaluation", "Finished", "Round", "Started"),
    "rounds.strategy_table": ("Strategy",),
    "stages.base": ("Stage", "StageContext"),
    "updates.update": ("Update",),
}
"""Module to the public names that it gives."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> object:
    """Load a public name."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fedpeft' has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"fedpeft.{_HOME_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
