"""The report in a real browser: Debian's chromium, headless, driven by playwright."""

import os
import shutil

import pytest
from report_runs import FID, images, make_run

from bvae.report.write import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("BVAE_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine (apt: chromium)")

# The lowest contrast of a text with what is behind it (WCAG), over all texts that are shown; charts' too.
CONTRASTS = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0) layers.push([r, g, b, a]);
      if (a === 1) break;
    }
    let color = layers.pop() || [255, 255, 255];
    for (const [r, g, b, a] of layers.reverse()) color = [r, g, b].map((v, i) => v * a + color[i] * (1 - a));
    return color.slice(0, 3);
  };
  const found = [];
  for (const element of document.querySelectorAll("body *:not(script):not(style)")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || !box.width || !box.height) continue;
    const css = getComputedStyle(element);
    if (css.visibility === "hidden" || Number(css.opacity) === 0) continue;
    const ink = parse(element instanceof SVGElement ? css.fill : css.color).slice(0, 3);
    const [a, b] = [luminance(ink), luminance(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        # The sandbox needs privileges that containers withhold; the pages are our own.
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """One run's page and a comparison, with a long name and a run without anything in it."""
    folder = tmp_path_factory.mktemp("runs")
    data = images(folder / "images.npz")
    factors = {"names": ["number", "kind", "x", "y", "size", "rotation", "hue", "background"], "active_latents": [1, 3]}
    factors |= {"correlation": [[0.1, 1.0, 0.5, 0.0, 0.3, 0.2, 0.8, 0.6]] * 6, "latent_kl": [1.0] * 6, "true": 8}
    first = make_run(folder / "first", data, results={"fid": FID, "factors": factors})
    # Published figures stand beside it.
    name = "a-run-with-a-name-that-is-much-longer-than-anybody-would-like-and-not-to-be-broken"
    second = make_run(folder / name, data, results={"fid": FID}, info={"data": {"name": "cifar10"}})
    begun = make_run(folder / "<b>begun", None, epochs=(0, 0), results=False)
    return {
        "one": write_report([first]),
        "three": write_report([second, first, begun], folder / "comparison.html"),
    }


class Visit:
    """A page that was opened and seen from top to bottom, with what it said and asked for on the way."""

    def __init__(self, browser, path, width, scheme, phone=False):
        self.said, self.requests = [], []
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, is_mobile=phone, has_touch=phone
        )
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        height = self.page.evaluate("document.documentElement.scrollHeight")
        for top in range(0, height, 1200):
            self.page.evaluate(f"scrollTo(0, {top})")
            self.page.wait_for_timeout(15)
        self.wait_for("[...document.querySelectorAll('.plot')].every((p) => p.querySelector('.scatterlayer .trace'))")

    def wait_for(self, condition):
        """playwright's own wait_for_function evaluates text in the page, which the page's policy forbids."""
        for _ in range(200):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"after 10 s still not so: {condition}")

    def close(self):
        self.context.close()


@pytest.fixture(scope="module", params=["one", "three"])
def visits(request, browser, pages):
    """The same page on a desk, in the light, and on a phone, in the dark."""
    desk = Visit(browser, pages[request.param], 1280, "light")
    phone = Visit(browser, pages[request.param], 360, "dark", phone=True)
    yield desk, phone
    desk.close()
    phone.close()


def test_nothing_is_said_and_nothing_asked_for(visits):
    for visit in visits:
        assert visit.said == []
        assert [url for url in visit.requests if not url.startswith(("data:", "blob:"))] == [visit.page.url]


def test_every_chart_and_picture_is_there(visits):
    page = visits[0].page
    assert page.locator(".plot").count() >= 16
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("[...document.images].length") >= 9


def test_a_phone_scrolls_down_only(visits):
    page = visits[1].page
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    # No chart takes a finger's drag, and none is wider than its place.
    assert page.evaluate(
        "[...document.querySelectorAll('.plot')].every((p) => p.layout.dragmode === false && p.layout.xaxis.fixedrange "
        "&& p.querySelector('.main-svg').getBoundingClientRect().right <= innerWidth)"
    )


def test_texts_stand_out_from_what_is_behind_them(visits):
    for visit in visits:
        contrasts = visit.page.evaluate(CONTRASTS)
        assert len(contrasts) > 200
        assert contrasts[0][0] >= 4.5, contrasts[:5]


def test_charts_follow_the_scheme_and_injected_code_does_nothing(browser, pages):
    visit = Visit(browser, pages["one"], 1280, "light")
    page = visit.page
    try:
        ink = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
        light = page.evaluate(ink)
        page.emulate_media(color_scheme="dark")
        visit.wait_for(f"{ink} !== {light!r}")
        assert page.evaluate(CONTRASTS)[0][0] >= 4.5
        assert visit.said == []
        # Even if something slipped through the escaping, the policy lets only the page's own two scripts run.
        page.evaluate(
            """() => {
              const script = document.createElement("script");
              script.textContent = "window.ran = 1";
              const image = new Image();
              image.src = "http://127.0.0.1:9/x.png";
              document.body.append(script, image);
            }"""
        )
        page.wait_for_timeout(100)
        assert page.evaluate("window.ran") is None
        assert len(visit.said) == 2 and all("Content Security Policy" in text for text in visit.said)
    finally:
        visit.close()


def test_without_scripts_pictures_and_tables_remain(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto(pages["one"].as_uri())
        assert page.get_by_text("The charts are drawn by a script").is_visible()
        assert page.get_by_alt_text("64 samples of first, GEN-2").is_visible()
        assert page.get_by_text("Test mse, z sampled").is_visible()
    finally:
        context.close()
