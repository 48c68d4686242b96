"""The report in a real Chromium: no errors, working controls, only its own scripts, readable text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from synthetic_analyses import make, progressive

from internal_policy import analyze, compare
from internal_policy.bupo.run import Run
from internal_policy.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here; Debian's packages chromium and chromium-driver run this"
)
selenium = pytest.importorskip("selenium", reason="selenium drives the browser: make setup")

SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
STORED = Path(__file__).resolve().parents[2] / "data" / "experiments"
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
LONG = "an-organisation-with-a-name/" + "a-model-whose-name-does-not-end-" * 4


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind with untrusted names and texts."""
    root = tmp_path_factory.mktemp("pages")
    found = analyze("testbed/qwen3", max_responses=4, keep_tokens=2, max_new_tokens=12, heads=True)
    tokens, sequences = found.tokens.copy(), found.sequences.copy()
    first = (tokens["response"] == 0) & (tokens["token"] == 0)
    tokens["token_text"] = tokens["token_text"].astype(object).mask(first, HOSTILE)
    sequences["response"] = HOSTILE
    foreign = replace(found, name=LONG + HOSTILE, tokens=tokens, sequences=sequences)
    (run,) = sorted((STORED / "runs").glob("qwen3-bupo-l7-s12-lr0.0001-t120-seed0"))
    return {
        "analysis": (write_report(foreign, root / "analysis"), foreign),
        "comparison": (write_report(compare(found, foreign), root / "comparison"), None),
        "training": (write_report(Run.load(run), root / "training"), None),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With both paths given nothing is looked for, so nothing is fetched.
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def show(browser, path, width=1280, *, scheme="light", media=""):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(path.as_uri())
    browser.execute_script("localStorage.clear()")
    browser.get(path.as_uri())


def found(browser, part):
    return browser.execute_script('return document.querySelector(`[data-part="${arguments[0]}"]`)', part)


def move(browser, part, value, event="change"):
    browser.execute_script(
        'const c = document.querySelector(`[data-part="${arguments[0]}"]`); c.value = arguments[1];'
        "c.dispatchEvent(new Event(arguments[2], {bubbles: true}))",
        *(part, str(value), event),
    )


def coloured(browser):
    """Background, shown value and text of each token."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.token')].map(t => [t.style.background, t.dataset.value, t.textContent])"
    )


@pytest.mark.parametrize(
    ("kind", "width", "scheme"),
    [
        *(("analysis", 390, "dark"), ("analysis", 1280, "light"), ("comparison", 390, "dark")),
        *(("comparison", 1280, "light"), ("training", 390, "dark"), ("training", 1280, "light")),
    ],
)
@pytest.mark.slow
def test_pages_open_without_errors_and_are_readable(browser, pages, kind, width, scheme):
    show(browser, pages[kind][0], width, scheme=scheme)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.ran") is None
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    across, inner = browser.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
    assert (across <= inner, inner) == (True, width)
    # Every text has a size that can be read, in the figures too.
    smallest = browser.execute_script(
        "const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); let least = 99;"
        "while (walk.nextNode()) { const e = walk.currentNode.parentElement;"
        "if (walk.currentNode.data.trim() && !e.closest('script, style, noscript') && e.getClientRects().length)"
        "least = Math.min(least, parseFloat(getComputedStyle(e).fontSize)); } return least"
    )
    assert smallest >= 12
    plots = browser.execute_script("return document.querySelectorAll('.plot').length")
    drawn = browser.execute_script("return document.querySelectorAll('.plot .main-svg .scatterlayer .trace').length")
    assert drawn >= plots >= 3
    outside = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].flatMap(p => { const box = p.getBoundingClientRect();"
        "return [...p.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();"
        "return b.width && (b.left < box.left - 1 || b.right > box.right + 1 || b.bottom > box.bottom + 1); })"
        ".map(t => t.textContent) })"
    )
    assert outside == []


@pytest.mark.slow
def test_the_layer_slider_changes_the_colours_and_values_of_the_tokens(browser, pages):
    path, analysis = pages["analysis"]
    show(browser, path)
    assert found(browser, "layer").get_property("value") == str(analysis.boundary_layer)
    views = {}
    for layer in (1, 8):
        move(browser, "layer", layer, "input")
        views[layer] = coloured(browser)
        rows = analysis.tokens.query(f"response == 0 and site == 'layer' and layer == {layer}")
        shown = [float(value) for _, value, _ in views[layer]]
        assert shown == pytest.approx(rows["entropy_out"].tolist(), abs=6e-4)
        assert found(browser, "layer-shown").text.startswith(str(layer))
    assert [c for c, _, _ in views[1]] != [c for c, _, _ in views[8]]
    assert len({c for c, _, _ in views[1]}) > 1
    move(browser, "site", 2)
    move(browser, "quantity", 1)
    rows = analysis.tokens.query("response == 0 and site == 'ffn' and layer == 8")
    shown = [float(value.replace("−", "-")) for _, value, _ in coloured(browser)]
    assert shown == pytest.approx(rows["change"].tolist(), abs=6e-4)
    assert "Entropy change of FFN in layer 8" in found(browser, "state").text


@pytest.mark.slow
def test_responses_can_be_selected_by_keyboard(browser, pages):
    from selenium.webdriver.common.keys import Keys

    path, analysis = pages["analysis"]
    show(browser, path)
    # As older browsers have it.
    browser.execute_script("delete Element.prototype.ariaSelected")
    before = [text for _, _, text in coloured(browser)]
    assert before[0] == HOSTILE
    assert "</script>" in browser.execute_script("return document.querySelector('[data-part=answer]').textContent")
    move(browser, "response", 1)
    second = analysis.tokens.query("response == 1 and site == 'policy'")
    assert [text for _, _, text in coloured(browser)] == second["token_text"].tolist()
    browser.execute_script("document.querySelector('.token').focus()")
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    readout = found(browser, "readout").text
    row = analysis.tokens.query(
        f"response == 1 and token == 1 and site == 'layer' and layer == {analysis.boundary_layer}"
    )
    marked = "return [...document.querySelectorAll('.token[aria-selected=true]')].map(t => t.textContent)"
    assert browser.execute_script(marked) == [second["token_text"].iloc[1]]
    own = "return document.querySelector('[data-part=readout] strong > bdi').textContent"
    assert browser.execute_script(own) == second["token_text"].iloc[1]
    assert f"token 2 of {len(second)}, id {second['token_id'].iloc[1]}" in readout
    assert f"layer {analysis.boundary_layer}: entropy {float(row['entropy_out'].iloc[0]):.3f} nats" in readout
    assert browser.execute_script("return window.ran") is None
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_hidden_lines_stay_hidden_when_the_colour_scheme_changes(browser, pages):
    show(browser, pages["analysis"][0])
    visible = "const p = document.getElementById('a1-flow'); return p.data.filter(t => t.visible !== false).length"
    before = browser.execute_script(visible)
    browser.execute_script("document.querySelector('#a1-flow-key button').click()")
    after = browser.execute_script(visible)
    assert after < before
    ink = "return getComputedStyle(document.querySelector('#a1-flow .xtick text')).fill"
    light = browser.execute_script(ink)
    browser.execute_script("document.getElementById('theme').click()")
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
    assert browser.execute_script(ink) != light
    assert browser.execute_script(visible) == after
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.get(pages["analysis"][0].as_uri())
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == dark
    browser.execute_script("localStorage.clear()")
    assert browser.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width"), [(8, 1280), (8, 390), (36, 390)])
def test_hovering_over_the_final_policy_names_it_and_no_layer(browser, tmp_path, layers, width):
    complete = make(progressive(layers), prompts=4, noise=0.05)
    lacking = {"final_state_mean": 0.4, "final_state_stderr": 0.02}
    analysis = replace(complete, policy_entropy={**complete.policy_entropy, **lacking})
    show(browser, write_report(analysis, tmp_path), width)

    def pointed(x, y):
        """The title and the lines of the hover text there."""
        at = browser.execute_script(
            "const p = document.getElementById('a1-flow'), l = p._fullLayout; p.scrollIntoView({block: 'center'});"
            "const box = p.getBoundingClientRect(); return [box.left + l.xaxis._offset + l.xaxis.l2p(arguments[0]),"
            "box.top + l.yaxis._offset + l.yaxis.l2p(arguments[1])]",
            *(x, y),
        )
        # Hovering is throttled.
        for shift in (-1, 0):
            moved = {"type": "mouseMoved", "x": at[0] + shift, "y": at[1]}
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", moved)
            browser.execute_async_script("setTimeout(arguments[0], 150)")
        return browser.execute_script(
            "return [...document.querySelectorAll('#a1-flow .hoverlayer text')].map(t => t.textContent)"
        )

    mean = analysis.policy_entropy["mean"]
    place = browser.execute_script(
        "return document.getElementById('a1-flow').data.find(t => t.name.startsWith('policy')).x[0]"
    )
    readout = pointed(place, mean)
    assert readout[0] == "final policy"
    assert [text.startswith(f"policy π_θ {mean:.3f} nats") for text in readout[1:]] == [True]
    for layer in (3, layers):
        title, *lines = pointed(layer, float(analysis.curve("layer", "entropy_out").loc[layer]))
        assert title == f"Layer {layer}"
        assert any(text.startswith("layer output ") for text in lines)
        assert not [text for text in lines if "policy" in text]
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_print_layout_is_white_without_controls_and_unfolded(browser, pages):
    show(browser, pages["analysis"][0], 700, scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('select, input, #theme, .copy, nav')]"
        ".filter(e => e.getClientRects().length).length"
    )
    assert shown == 0
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.execute_script("return document.querySelector('[data-part=layers]').getClientRects().length") > 0
    assert browser.execute_script("return [...document.querySelectorAll('.plot svg.main-svg')][0].clientWidth") == 660
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_a_page_of_many_layers_and_tokens_stays_responsive(browser, pages, tmp_path):
    analysis = pages["analysis"][1]
    one = analysis.tokens.query("response == 1")
    layers = pd.concat([one[one["site"] != "policy"].assign(layer=one["layer"] + 8 * k) for k in range(8)])
    first = pd.concat([layers, one[one["site"] == "policy"].assign(layer=64)])
    n = one["token"].nunique()
    tokens = pd.concat([first.assign(token=first["token"] + n * k, response=0) for k in range(-(-1500 // n))])
    many = replace(analysis, tokens=tokens, model={**analysis.model, "layers": 8})
    path = write_report(replace(many, tokens=tokens[tokens["layer"] <= 8]), tmp_path)
    show(browser, path)
    assert browser.execute_script("return document.querySelectorAll('.token').length") == 1200
    moved = browser.execute_script(
        "const c = document.querySelector('[data-part=layer]'), t = performance.now();"
        "for (let l = 1; l <= 8; l++) { c.value = l; c.dispatchEvent(new Event('input')); }"
        "return (performance.now() - t) / 8"
    )
    assert moved < 150
    assert path.stat().st_size < 6e6
