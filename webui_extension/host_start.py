"""What is registered with the host whenever it loads its scripts: at its start and at each Reload UI."""

from __future__ import annotations

from secrets import compare_digest

import fastapi
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import script_callbacks, shared

from ..page import api, tab
from . import host, host_page, host_panel, host_sampling
from .host_backend import HostBackend


def start() -> None:
    """Register all; the host has forgotten what was registered before, but for the samplers."""
    host_sampling.register()
    host_page.forget()
    script_callbacks.on_after_component(host_page.keep)
    script_callbacks.on_before_ui(host_panel.add_axis)
    script_callbacks.on_ui_tabs(training_tab)
    script_callbacks.on_ui_settings(add_settings)
    script_callbacks.on_app_started(open_routes)


def training_tab() -> list[tuple]:
    """Our tab; the host is not to keep its fields' first values, which would then outlive the trainer's defaults."""
    page = tab.build(HostBackend())
    for component in page.blocks.values():
        setattr(component, host.NOT_SAVED, True)
    return [(page, "TurboDistill", "turbodistill")]


def add_settings() -> None:
    """Add our settings to the host's page of settings."""
    about = shared.OptionInfo("", "Folder of distillation runs", section=("turbodistill", "TurboDistill"))
    shared.opts.add_option(host.FOLDER, about.info("empty: turbodistill, in the folder of outputs"))
    about = shared.OptionInfo("", "Folders with prompts and pictures", section=("turbodistill", "TurboDistill"))
    shared.opts.add_option(
        host.READABLE, about.info("with ; between them; needed where the WebUI listens to other computers")
    )


def open_routes(_page, app: fastapi.FastAPI) -> None:
    """Our API, where the host opens its own, and under the same authentication."""
    if shared.cmd_opts.api or shared.cmd_opts.nowebui:
        credentials = shared.cmd_opts.api_auth
        guards = [fastapi.Depends(guard(credentials))] if credentials else []
        api.add_routes(app, HostBackend(), dependencies=guards)


def guard(credentials: str):
    """FastAPI's check of the names and passwords that `--api-auth name:password,...` gives."""
    known = dict(pair.split(":", 1) for pair in credentials.split(","))

    def check(given: HTTPBasicCredentials = fastapi.Depends(HTTPBasic())) -> None:  # noqa: B008 - FastAPI's way
        password = known.get(given.username)
        if password is None or not compare_digest(given.password.encode(), password.encode()):
            raise fastapi.HTTPException(401, "wrong name or password", {"WWW-Authenticate": "Basic"})

    return check
