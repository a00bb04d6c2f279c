"""What is registered with the host: each thing once at every load, the API under the host's own password."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytestmark = pytest.mark.gradio
pytest.importorskip("gradio")
fastapi = pytest.importorskip("fastapi")
testing = pytest.importorskip("fastapi.testclient", reason="starlette's test client needs httpx")
PARTS = ("before_ui", "after_component", "ui_tabs", "ui_settings", "app_started")


@pytest.fixture
def host(webui, toys, tmp_path):
    """A host with a toy loaded, which keeps what is registered with it."""
    callbacks = ModuleType("modules.script_callbacks")
    callbacks.registered = {part: [] for part in PARTS}
    for part, kept in callbacks.registered.items():
        setattr(callbacks, f"on_{part}", kept.append)
    unused = {name: ModuleType(name) for name in ("devices", "extra_networks", "processing", "prompt_parser")}
    with webui.installed(webui.Model(toys.conv()), tmp_path, script_callbacks=callbacks, **unused) as made:
        made.registered = callbacks.registered
        yield made


def test_all_is_registered_at_each_load(host):
    start = host.get("host_start").start
    for times in (1, 2):
        start()
        assert [len(host.registered[part]) for part in PARTS] == [times] * len(PARTS)
        assert [entry.name for entry in host.samplers.all_samplers].count("ADD 1-step") == 1


@pytest.fixture
def client(host):
    """Our routes on a server of their own; the host's flags as given."""

    def serve(**flags):
        vars(host.shared.cmd_opts).update(flags)
        app = fastapi.FastAPI()
        host.get("host_start").open_routes(None, app)
        return testing.TestClient(app)

    return serve


def test_the_api_is_open_where_the_host_s_is(client):
    assert client().get("/turbodistill/v1/settings").status_code == 200
    assert client(api=False, nowebui=True).get("/turbodistill/v1/settings").status_code == 200
    assert client(api=False, nowebui=False).get("/turbodistill/v1/settings").status_code == 404


@pytest.mark.parametrize(
    ("auth", "status"),
    [
        (None, 401),
        (("anna", "wrong"), 401),
        (("else", "open:sesame"), 401),
        (("anna", "open:sesame"), 200),
        (("ben", "b"), 200),
    ],
)
def test_the_host_s_password_guards_it(client, auth, status):
    guarded = client(api_auth="anna:open:sesame,ben:b")
    assert guarded.get("/turbodistill/v1/settings", auth=auth).status_code == status


def test_the_host_does_not_keep_the_tab_s_defaults(host):
    ((page, title, name),) = host.get("host_start").training_tab()
    assert (title, name) == ("TurboDistill", "turbodistill")
    labelled = [each for each in page.blocks.values() if getattr(each, "label", None)]
    assert len(labelled) > 10 and all(each.do_not_save_to_config for each in labelled)


def test_our_setting_moves_the_runs(host):
    class Option(SimpleNamespace):
        def info(self, text):
            self.told = text
            return self

    added = {}
    host.shared.OptionInfo = lambda default, label, section: Option(default=default, label=label, section=section)
    host.shared.opts.add_option = added.__setitem__
    host.get("host_start").add_settings()
    assert list(added) == [host.get("host").FOLDER, host.get("host").READABLE]
    assert [option.default for option in added.values()] == ["", ""]


@pytest.mark.parametrize(
    ("flags", "reached"),
    [
        ({}, False),
        ({"server_name": "127.0.0.1"}, False),
        ({"server_name": "localhost", "listen": False, "share": False}, False),
        ({"listen": True}, True),
        ({"share": True}, True),
        ({"ngrok": "token"}, True),
        ({"server_name": "192.168.0.7"}, True),
        ({"server_name": "0.0.0.0"}, True),
    ],
)
def test_where_others_reach_the_webui_files_are_read_below_its_own_folders_alone(host, tmp_path, flags, reached):
    vars(host.shared.cmd_opts).update(flags)
    ours = host.get("host")
    assert ours.listens_to_others() is reached
    host.shared.opts.turbodistill_readable_folders = f" {tmp_path / 'a'} ;; {tmp_path / 'b'}"
    own = Path(sys.modules["modules.paths"].data_path)
    assert ours.readable_folders() == ([own, tmp_path / "a", tmp_path / "b"] if reached else None)


def test_txt2img_s_components_are_known_once_all_are_there_and_forgotten_at_reload(host):
    ours = host.get("host_page")
    host.get("host_start").start()
    keep = host.registered["after_component"][-1]
    for name in ours.READ:
        assert ours.fields() == {}
        keep(f"txt2img's {name}", elem_id=f"txt2img_{name}")
        keep(f"img2img's {name}", elem_id=f"img2img_{name}")
    keep("none's")
    assert ours.fields() == {name: f"txt2img's {name}" for name in ours.READ}
    for label in ("txt2img", "Txt2img"):  # a hidden page's components are nowhere: a button that reads them breaks all
        host.shared.opts.hidden_tabs = [label]
        assert ours.fields() == {}
    host.shared.opts.hidden_tabs = ["Extras"]
    assert ours.fields()
    host.get("host_start").start()
    assert ours.fields() == {}


@pytest.mark.parametrize(
    ("architecture", "forge", "chosen", "l_skip", "skip"),
    [
        ("stable-diffusion-v1", False, 1, False, 1),
        ("stable-diffusion-v1", False, 2, False, 2),
        ("stable-diffusion-v1", True, 3, False, 3),
        ("stable-diffusion-v2", False, 2, False, 1),  # AUTOMATIC1111 has it for none but the first
        ("stable-diffusion-v2", True, 2, False, 2),
        ("stable-diffusion-xl-v1-base", False, 3, False, 2),
        ("stable-diffusion-xl-v1-base", False, 3, True, 0),  # of one of two text encoders alone
        ("stable-diffusion-xl-v1-base", False, 2, True, 2),
        ("stable-diffusion-xl-v1-base", True, 1, False, 2),
        ("stable-diffusion-xl-v1-base", True, 4, False, 4),
        ("flux-1-dev", True, 2, False, 0),
    ],
)
def test_the_clip_skip_that_the_host_reads_prompts_with(host, architecture, forge, chosen, l_skip, skip):
    vars(host.shared.opts).update(CLIP_stop_at_last_layers=chosen, sdxl_clip_l_skip=l_skip)
    model = SimpleNamespace(set_clip_skip=print) if forge else SimpleNamespace()
    assert host.get("host").clip_skip(model, architecture) == skip
