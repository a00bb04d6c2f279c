"""A page of another site, in a real browser, can trigger no route of `turbodistill ui`: neither ours nor gradio's."""

import http.client
import json
import urllib.request

import pytest

pytest.importorskip("gradio", reason="needs gradio: pip install 'turbodistill[ui]'")
pytest.importorskip("diffusers", reason="needs diffusers: pip install 'turbodistill[demo]'")
pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = "/turbodistill/v1"
ROUTES = ("distill", "estimate", "run", "stop", "cancel", "preview", "students", "runs", "settings")
QUICK = {"built_in": "the embedded model's", "settings": {"rank": 4, "pairs": 4}}


def read(url, body=None, **headers):
    """Status and text of an answer to a program."""
    given = {"Content-Type": "application/json"} | headers
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, given), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_can_trigger_nothing(served, browser, foreign):
    url, folder, _ = served
    config = json.loads(read(f"{url}/config")[1])
    click = foreign.event(config, "turbodistill-distil", {"turbodistill-name": "theirs"}, "/gradio_api")
    asked = [*((f"{ROOT}/{route}", QUICK) for route in ROUTES), *click, ("/gradio_api/upload", {})]
    answers = foreign.attack(browser, url, asked)
    assert len(answers) > 200 and {path for path, _ in asked} == {answer.path for answer in answers}
    assert {answer.status for answer in answers} == {403}, [a for a in answers if a.status != 403][:20]
    status, told = read(f"{url}{ROOT}/run")
    assert status == 404 and "nothing has run" in told and not (folder / "runs").exists()
    # What it sent was right: from our own page, or a program, it is answered.
    path, body = click[2]
    body["data"][0] = "a/b"
    assert read(url + path, json.dumps(body).encode(), **{"Sec-Fetch-Site": "same-origin"})[0] == 200
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=foreign", timeout=60) as stream:
        assert any(b"name is" in line for line in stream)


def test_a_link_from_there_opens_our_page(served, browser):
    url, *_ = served
    opened = browser.new_page()
    opened.goto("data:text/html,<a href='" + url + "'>pictures</a>")
    opened.click("a")
    opened.wait_for_selector("#turbodistill-prompt")
    opened.close()


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "0.0.0.0", ""])
def test_a_name_that_another_site_has_led_here_is_refused(served, host):
    """DNS rebinding: to the browser such a page is of the same origin."""
    url, *_ = served
    for method, path in (("GET", "/"), ("POST", f"{ROOT}/distill"), ("POST", "/gradio_api/queue/join")):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.putrequest(method, path, skip_host=True)
        for name, value in (("Host", host), ("Origin", f"http://{host}"), ("Content-Length", "2")):
            connection.putheader(name, value)
        connection.putheader("Content-Type", "application/json")
        connection.endheaders(b"{}")
        assert connection.getresponse().status == 400
        connection.close()
