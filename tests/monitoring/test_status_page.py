"""The status page as a person sees it: in a real browser, served by a monitor whose engine is made up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from engine_fakes import engine_status, lane_status
from webdriver import Browser, browser

from sidecar.engine.observer import StageTimes
from sidecar.engine.status import EngineStatus
from sidecar.monitoring.metrics import Metrics
from sidecar.monitoring.monitor import Monitor

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not shutil.which("chromedriver"), reason="no chromedriver: make test-browser"),
]

# Where pictures of the page are kept, for a look.
PICTURES = os.environ.get("EPD_TEST_PICTURES")
HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"
TIMES = StageTimes(decode_ms=12.0, preprocess_ms=8.0, queue_ms=40.0, run_ms=410.0, publish_ms=1.5)


@dataclass
class Site:
    """A monitor and what it shows; `status` may be changed at any time."""

    status: EngineStatus = field(default_factory=engine_status)
    metrics: Metrics = field(default_factory=Metrics)
    healthy: bool = True

    def __post_init__(self) -> None:
        self.monitor = Monitor.start("127.0.0.1:0", self.metrics, lambda: self.healthy)

    def watch(self) -> None:
        self.metrics.watch(lambda: self.status)

    def restart(self) -> None:
        """Another process on the same port, which has everything before it."""
        self.metrics = Metrics()
        self.watch()
        self.monitor = Monitor.start(self.monitor.address, self.metrics, lambda: self.healthy)

    @property
    def url(self) -> str:
        return f"http://{self.monitor.address}/"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "chromedriver.log") as session:
        yield session


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.monitor.close()


@pytest.fixture
def page(site: Site, chromium: Browser) -> Browser:
    """A browser that has the page open and has the first values."""
    chromium.complaints()
    chromium.device(1280, 900)
    site.watch()
    chromium.open(site.url)
    chromium.wait_for("document.querySelector('#state').textContent == 'Serving'")
    return chromium


def test_shows_how_the_engine_is(site: Site, page: Browser) -> None:
    assert page.text("#fingerprint") == "sha256:5f0c9a"
    assert page.text(".tiles .card:nth-child(2) .big") == "5,120 of 65,536 patches"
    assert page.text("#queue-items") == "5"
    assert page.text("#clients") == "2 clients wait"
    assert page.text("#hit-rate") == "40 %"
    assert page.text("#store-bytes") == "1.0 GB of 4.0 GB, 120 embeddings"
    assert page.text("#store-leases") == "4 leases held, 1 expired, 2 unkept"
    lane = page.text("#lanes article")
    for words in ("openvino-cpu", "serving", "Intel(R) Xeon(R) Platinum 8481C · bf16", "75 %", "2.50 s", "40"):
        assert words in lane
    assert page.text("#no-errors") == "None since the start."


def test_draws_the_cost_of_a_run(page: Browser) -> None:
    assert page.run("return document.querySelectorAll('.plot .sample').length") == 32
    label = page.run("return document.querySelector('.plot').getAttribute('aria-label')")
    assert label == "Cost of a run on openvino-cpu: 1,024 patches take about 440 ms; 32 runs shown"
    far_end = "return document.querySelector('.plot polyline.model').points[60].y"
    near_end = "return document.querySelector('.plot polyline.model').points[0].y"
    assert page.run(far_end) < page.run(near_end), "more patches must lie higher"


def test_counts_stages_refusals_and_errors(site: Site, page: Browser) -> None:
    for _ in range(20):
        site.metrics.encoded("openvino-cpu", TIMES)
        site.metrics.answered("embedding", "encoded")
    for _ in range(3):
        site.metrics.answered("ITEM_TOO_LARGE", "")
    site.metrics.refused("OVERLOADED")
    site.metrics.error("LANE_FAULT", "the runtime failed")
    page.wait_for("document.querySelector('#errors li')")
    assert page.text("#stages tr:nth-child(4)").split() == ["run", "410", "ms", "410", "ms"]
    assert page.text("#refusals").split() == ["ITEM_TOO_LARGE", "3", "OVERLOADED", "1"]
    assert page.text("#embeddings") == "20"
    assert "LANE_FAULT" in page.text("#errors")
    assert page.text("#errors .message") == "the runtime failed"


def test_new_values_show_without_a_reload(site: Site, page: Browser) -> None:
    page.run("window.kept = true")
    site.status = engine_status(
        waiting_patches=60_000, lanes=(lane_status(busy=0.2), lane_status("onnx-cpu", busy=0.9))
    )
    page.wait_for("document.querySelectorAll('#lanes article').length == 2")
    assert page.text("#queue-patches") == "60,000"
    assert page.run("return document.querySelector('#patches-bar').dataset.state") == "warn"
    site.status = engine_status(lanes=(lane_status("onnx-cpu"),))
    page.wait_for("document.querySelectorAll('#lanes article').length == 1")
    assert page.text("#lanes h3") == "onnx-cpu"
    assert page.run("return window.kept")


def test_a_lane_that_is_out_shows_at_once(site: Site, page: Browser) -> None:
    out = lane_status("onnx-cpu", state="out", last_error="the device went away")
    site.status = engine_status(lanes=(lane_status(), out))
    page.wait_for("document.querySelector('#state').textContent == 'Serving, 1 of 2 lanes out'")
    assert "out of service" in page.text("#lanes article:nth-child(2)")
    assert page.text("#lanes article:nth-child(2) .fault") == "Last error: the device went away"


def test_hostile_text_stays_text(site: Site, page: Browser) -> None:
    site.metrics.error(HOSTILE, HOSTILE)
    site.metrics.refused(HOSTILE)
    site.status = engine_status(
        fingerprint=HOSTILE, lanes=(lane_status(HOSTILE, device=HOSTILE, last_error=HOSTILE, state="out"),)
    )
    page.wait_for("document.querySelector('#errors li') && document.querySelector('#lanes .fault').textContent")
    assert page.text("#errors .message") == HOSTILE
    assert page.text("#lanes h3") == HOSTILE
    assert HOSTILE in page.text("#lanes .fault")
    assert page.run("return document.querySelectorAll('img, script').length") == 1  # the page's own script
    assert page.run("return document.title") != "taken"
    assert page.complaints() == []


def test_the_browser_has_nothing_to_complain_about(page: Browser) -> None:
    page.wait_for("document.querySelector('.plot')")
    assert page.complaints() == []
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert {name.rpartition("/")[2] for name in loaded} <= {"status.json"}, "the page is whole in itself"


def test_nothing_but_the_pages_own_script_may_run(page: Browser) -> None:
    page.run(
        "const added = document.createElement('script'); added.textContent = 'window.taken = true';"
        "document.body.append(added)"
    )
    assert page.run("return window.taken") is None
    assert any("Content Security Policy" in said for said in page.complaints())


def test_a_page_without_a_server_keeps_the_last_values(site: Site, page: Browser) -> None:
    site.monitor.close()
    page.wait_for("!document.querySelector('#notice').hidden")
    assert page.text("#notice").startswith("No connection since ")
    assert page.text("#state") == "No connection"
    assert page.text("#queue-patches") == "5,120"
    site.status = replace(site.status, waiting_patches=7)
    site.restart()
    page.wait_for("document.querySelector('#queue-patches').textContent == '7'")
    assert page.run("return document.querySelector('#notice').hidden")
    assert page.text("#state") == "Serving"


def test_a_server_that_still_loads_says_so(site: Site, chromium: Browser) -> None:
    site.healthy = False
    chromium.open(site.url)
    chromium.wait_for("document.querySelector('#state').textContent == 'Loading the model…'")
    site.watch()
    chromium.wait_for("document.querySelector('#state').textContent == 'Not serving'")


def test_figures_that_are_not_numbers_leave_a_page(site: Site, page: Browser) -> None:
    cost = replace(lane_status().cost, per_pair_ms=float("nan"), samples=((1024, float("inf")),))
    site.status = engine_status(hits=0, misses=0, coalesced=0, store=None, lanes=(lane_status(cost=cost),))
    page.wait_for("document.querySelectorAll('.plot .sample').length == 0")
    assert page.text("#hit-rate") == "–"
    assert page.text("#store-bytes") == "no store on this server"
    assert page.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (768, 1000), (360, 740)])
def test_fits_every_screen_and_can_be_read_in_light_and_dark(
    site: Site, page: Browser, scheme: str, width: int, height: int
) -> None:
    busy_site(site)
    page.device(width, height, scheme)
    page.wait_for("document.querySelector('#errors li') && document.querySelector('#lanes .fault')")
    page.wait_for(f"document.documentElement.scrollWidth <= {width}")
    if PICTURES:
        page.wait_for("past.length > 6", 15)
        page.screenshot(Path(PICTURES) / f"status-{width}-{scheme}.png")
    assert page.run(_OVERLAPS) == []
    for low, words in page.run(_CONTRASTS):
        assert low >= 4.5, f"{words!r} has a contrast of {low:.2f} to 1"


def busy_site(site: Site) -> None:
    """Enough of everything that each part of the page has something in it."""
    for n in range(200):
        site.metrics.encoded("openvino-cpu", replace(TIMES, run_ms=300 + 2.0 * n, queue_ms=5 + 3.0 * (n % 60)))
        site.metrics.answered("embedding", "encoded")
    for reason, count in (("OVERLOADED", 12), ("ITEM_TOO_LARGE", 3), ("INVALID_ITEM", 2)):
        for _ in range(count):
            site.metrics.answered(reason, "")
    site.metrics.error("INVALID_ITEM", "image: cannot identify the format of the picture")
    for _ in range(4):
        site.metrics.error(
            "LANE_FAULT", "openvino-gpu: the runtime failed on a run of 4,096 patches; the item may be sent again"
        )
    gpu = lane_status(
        "openvino-gpu", device="Intel(R) Arc(TM) A770", precision="f16", state="out", streams=1, busy=0.0,
        running_items=0, backlog_ms=0.0, failures=4, last_error="CL_OUT_OF_RESOURCES while running the graph",
    )  # fmt: skip
    site.status = engine_status(lanes=(lane_status(), gpu))


# Words in a plot that lie over each other.
_OVERLAPS = """
    const found = [];
    for (const plot of document.querySelectorAll('.plot')) {
      const words = [...plot.querySelectorAll('text')].map((node) => [node.textContent, node.getBoundingClientRect()]);
      words.forEach(([one, a], i) => words.slice(i + 1).forEach(([other, b]) => {
        if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push([one, other]);
      }));
    }
    return found;
"""

# The WCAG contrast of every visible piece of text to the nearest opaque background behind it.
_CONTRASTS = """
    const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const parse = (css) => css.match(/[\\d.]+/g).map(Number);
    const over = ([r, g, b, a = 1], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
    function behind(node) {
      if (!node) return [255, 255, 255];
      return over(parse(getComputedStyle(node).backgroundColor), behind(node.parentElement));
    }
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    for (let node; (node = walk.nextNode());) {
      const holder = node.parentElement;
      if (!node.data.trim() || !holder.checkVisibility() || holder.tagName == 'SCRIPT') continue;
      const style = getComputedStyle(holder), back = behind(holder);
      const ink = over(parse(holder.closest('svg') ? style.fill : style.color), back);
      const [low, high] = [light(ink), light(back)].sort((a, b) => a - b);
      found.push([(high + 0.05) / (low + 0.05), node.data.trim()]);
    }
    return found;
"""
