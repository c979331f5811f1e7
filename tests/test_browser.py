"""The record as a person sees it: MLflow's own UI in a real browser, without a network."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
    WebDriverException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from pipelines.config import Config, flat
from pipelines.spool import Spool
from pipelines.tracking import (
    RunDescription,
    RunRecord,
    create_run,
    quiet_environment,
    resolve_tracking_uri,
    send,
    start_follower,
    write_record,
)

# Two pretraining runs and what their features are worth.
SCORES = {"ratio-75": (96.31, 93.94), "ratio-50": (94.72, 91.57)}
COLOURS = {"ratio-75": "navy", "ratio-50": "darkorange"}
# A search's trials: mask ratio and decoder width, and top-1 of the linear probe.
TRIALS = {(0.5, 64): 41.2, (0.5, 256): 43.0, (0.75, 64): 52.1, (0.75, 256): 51.4, (0.9, 64): 33.9, (0.9, 256): 35.5}
AXES = ("model.mask_ratio", "model.decoder_width", "probe/linear_top1")
# What the page answers while it is still being drawn.
NOT_YET = (StaleElementReferenceException, ElementNotInteractableException, ElementClickInterceptedException)
KEYS = ("transfer/digits/linear_top1", "transfer/digits/knn_top1")


@pytest.fixture
def browser_path() -> str:
    path = shutil.which("chromium")
    if path is None or shutil.which("chromedriver") is None:
        told = "no chromium with its chromedriver is installed (apt-get install chromium chromium-driver)"
        if os.environ.get("MAE_REQUIRE_BROWSER") == "1":
            pytest.fail(told)
        pytest.skip(told)
    return path


def draw(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (240, 80), "white")
    for left in (0, 80, 160):
        ImageDraw.Draw(image).ellipse((left + 15, 15, left + 65, 65), fill=colour)
    image.save(path)


def about(name: str, parent: str | None = None) -> RunDescription:
    params = {"model.mask_ratio": f"0.{name[6:8]}", "run.seed": "0"}
    return RunDescription(experiment="digits", name=name, params=params, parent_run_id=parent)


def record(storage: Path, name: str) -> tuple[str, str]:
    """A pretraining run with its transfer scores, and the transfer as its child; their ids in MLflow."""
    uri = resolve_tracking_uri(str(storage))
    folder = storage / name
    run_id = RunRecord.read(folder).mlflow_run_id if (folder / "run.json").exists() else None
    run_id = run_id or create_run(folder, about(name), tracking_uri=uri, timeout_s=60)
    assert run_id is not None
    spool = Spool(folder)
    spool.status("RUNNING")
    for step in range(10, 210, 10):
        spool.metrics(step, {"train/loss": 1 / (1 + step / 50), "probe/knn_top1": SCORES[name][1] - 200 / step})
    for step, colour in ((100, "gray"), (200, COLOURS[name])):
        file = f"pictures/reconstruction-{step:08d}.png"
        draw(folder / file, colour)
        spool.image(step, "reconstruction", file)
    spool.metrics(0, dict(zip(KEYS, SCORES[name], strict=True)))
    spool.status("FINISHED")
    spool.close()
    sent = send(folder, timeout_s=60)
    assert sent.left == 0, sent.problem
    transfer = about(f"{name} digits linear", run_id)
    child = create_run(storage / f"{name}-transfer", transfer, tracking_uri=uri, timeout_s=60)
    assert child is not None
    return run_id, child


@contextlib.contextmanager
def mlflow_ui(storage: Path) -> Iterator[str]:
    """MLflow's UI as ``make mlflow`` starts it, on a free port of this machine alone; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("mlflow")), "ui", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", resolve_tracking_uri(str(storage))]
    with (storage / "ui.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=storage,
            env={**os.environ, **quiet_environment()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        # The whole group: killed alone, the parent leaves its uvicorn workers behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_ui(address: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=2)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        assert time.monotonic() < deadline, "the UI does not answer"
        time.sleep(0.2)


def of_profile(profile: Path) -> list[psutil.Process]:
    return [
        p for p in psutil.process_iter(["cmdline"]) if any(str(profile) in part for part in p.info["cmdline"] or ())
    ]


@contextlib.contextmanager
def chromium(path: str, profile: Path) -> Iterator[webdriver.Chrome]:
    """A headless browser that finds no host but this one; nothing of it is left afterwards."""
    options = webdriver.ChromeOptions()
    options.binary_location = path
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in (
        "--headless=new",
        "--no-sandbox",  # root has none; the pages are this machine's own
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        "--window-size=1280,900",
        "--enable-unsafe-swiftshader",  # MLflow draws parallel coordinates with WebGL
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    driver = None
    try:
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        driver.set_page_load_timeout(30)
        yield driver
    finally:
        if driver is not None:
            with contextlib.suppress(WebDriverException):
                driver.quit()
        for process in of_profile(profile):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def requested(driver: webdriver.Chrome) -> list[str]:
    """Every address that the pages asked for."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def click(wait: WebDriverWait, path: str) -> None:
    """Clicks on an element as soon as there is one and it holds still."""

    def clicked(driver: webdriver.Chrome) -> bool:
        driver.find_element(By.XPATH, path).click()
        return True

    wait.until(clicked, f"nothing to click on at {path}")


def close_panel(driver: webdriver.Chrome) -> None:
    """Closes the panel beside the page."""
    for button in driver.find_elements(By.CSS_SELECTOR, "button[aria-label='Close']"):
        driver.execute_script("arguments[0].click()", button)  # one of them lies hidden


def body(driver: webdriver.Chrome) -> str:
    return driver.find_element(By.TAG_NAME, "body").text


def test_the_ui_compares_runs_by_their_transfer_scores(browser_path: str, tmp_path: Path):
    # The first makes the database, which the UI must find.
    uri = resolve_tracking_uri(str(tmp_path))
    assert create_run(tmp_path / "ratio-75", about("ratio-75"), tracking_uri=uri, timeout_s=60)
    with mlflow_ui(tmp_path) as address, ThreadPoolExecutor() as pool:
        ids = dict(zip(SCORES, pool.map(lambda name: record(tmp_path, name), SCORES), strict=True))
        wait_for_ui(address)
        profile = tmp_path / "profile"
        with chromium(browser_path, profile) as driver:
            wait = WebDriverWait(driver, 20, ignored_exceptions=NOT_YET)
            see_the_tree(driver, wait, address, ids)
            see_the_picture(driver, wait, address, ids["ratio-75"][0])
            see_the_scores(driver, wait, address, [parent for parent, _ in ids.values()])
            # What the browser shows itself, such as its empty tab, is no request to anybody.
            own = (address, "data:", "blob:", "chrome:", "chrome-untrusted:")
            outside = [url for url in requested(driver) if not url.startswith(own)]
            assert not outside
        assert not of_profile(profile)


def see_the_tree(driver: webdriver.Chrome, wait: WebDriverWait, address: str, ids: dict[str, tuple[str, str]]) -> None:
    """The table lists the pretraining runs, and below each, once it is unfolded, its transfer."""
    driver.get(f"{address}/#/experiments/1/runs")
    wait.until(lambda _: all(name in body(driver) for name in SCORES))
    assert "digits linear" not in body(driver)
    for name, (parent, child) in ids.items():
        cell = f"//*[@role='gridcell'][.//a[contains(@href, '{parent}')]]"
        click(wait, f"{cell}//button")

        def unfolded(_: webdriver.Chrome, parent: str = parent, child: str = child) -> bool:
            above, below = (driver.find_element(By.CSS_SELECTOR, f"a[href*='{run}']").rect for run in (parent, child))
            return 0 < below["y"] - above["y"] < 2 * above["height"] + 20 and below["x"] > above["x"]

        wait.until(unfolded, f"the transfer of {name} does not stand below it")


def see_the_picture(driver: webdriver.Chrome, wait: WebDriverWait, address: str, run_id: str) -> None:
    """The run's page shows the newest reconstructions: what was drawn."""
    driver.get(f"{address}/#/experiments/1/runs/{run_id}/artifacts/images")
    click(wait, "//*[contains(text(), '+step+200+') and contains(text(), '.png')]")
    pixels = """
        const image = [...document.images].find(i => i.complete && i.naturalWidth === 240 && i.naturalHeight === 80);
        if (!image) return null;
        const canvas = Object.assign(document.createElement('canvas'), {width: 240, height: 80});
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        return [[2, 2], [40, 40]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data].slice(0, 3));
    """
    seen = wait.until(lambda _: driver.execute_script(pixels), "no picture of 240x80 is shown")
    assert seen == [[255, 255, 255], [0, 0, 128]]


def see_the_scores(driver: webdriver.Chrome, wait: WebDriverWait, address: str, run_ids: list[str]) -> None:
    """The compare page has both scores of both runs, in the order of the runs."""
    chosen = json.dumps(run_ids, separators=(",", ":"))
    driver.get(f'{address}/#/compare-runs?runs={chosen}&experiments=["1"]')
    for i, key in enumerate(KEYS):
        # The names and the values are two columns of boxes: what belongs together stands at the same height.
        name = wait.until(lambda _, key=key: driver.find_element(By.LINK_TEXT, key))
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", name)
        values = [driver.find_element(By.XPATH, f"//span[text()='{scores[i]}']") for scores in SCORES.values()]
        assert all(abs(value.rect["y"] - name.rect["y"]) < 20 for value in values)
        assert values[0].rect["x"] < values[1].rect["x"]
    if where := os.environ.get("MAE_SCREENSHOT"):
        close_panel(driver)
        driver.set_window_size(1280, 1150)
        title = driver.find_element(By.XPATH, "//*[text()='Run details']")
        driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", title)
        time.sleep(1)  # the columns move when the panel beside them closes
        assert driver.save_screenshot(where)


def record_search(storage: Path) -> tuple[str, list[str]]:
    """A search whose trials have ended, as its driver's follower sends it; the ids in MLflow."""
    uri, folder = resolve_tracking_uri(str(storage)), storage / "found"
    about_search = RunDescription(experiment="digits", name="found", tags={"mae.kind": "search"})
    parent = create_run(folder, about_search, tracking_uri=uri, timeout_s=60)
    assert parent is not None
    trials = []
    for (ratio, width), score in TRIALS.items():
        name = f"decoder_width_{width}-mask_ratio_{ratio}"
        config = Config.model_validate({
            "model": {"mask_ratio": ratio, "decoder_width": width}, "run": {"name": name},
        })  # fmt: skip
        told = RunDescription(experiment="digits", name=name, params=flat(config), parent_run_id=parent)
        trials.append(folder / "trials" / name)
        write_record(trials[-1], told, tracking_uri=uri)
        spool = Spool(trials[-1])
        spool.status("RUNNING")
        for step, share in ((100, 0.8), (200, 1.0)):
            spool.metrics(step, {"train/loss": 1 / step, "probe/knn_top1": share * score - 5, AXES[2]: share * score})
        spool.status("FINISHED")
        spool.close()
    assert start_follower(folder).stop(timeout_s=60)
    ids = [RunRecord.read(trial).mlflow_run_id for trial in trials]
    return parent, [one for one in ids if one]


@pytest.mark.chaos
def test_the_ui_draws_a_searchs_trials_as_parallel_coordinates(browser_path: str, tmp_path: Path):
    parent, trials = record_search(tmp_path)
    assert len(trials) == len(TRIALS)
    with mlflow_ui(tmp_path) as address:
        wait_for_ui(address)
        with chromium(browser_path, tmp_path / "profile") as driver:
            wait = WebDriverWait(driver, 30, ignored_exceptions=NOT_YET)
            driver.get(f"{address}/#/experiments/1/runs")
            click(wait, f"//*[@role='gridcell'][.//a[contains(@href, '{parent}')]]//button")
            for run in trials:
                click(wait, f"//*[@role='row'][.//a[contains(@href, '{run}')]]//input[@type='checkbox']")
            click(wait, "//*[@data-testid='runs-compare-button']")
            choose(driver, wait)
            see_the_axes(driver, wait)


def axes(driver: webdriver.Chrome) -> dict[str, list[str]]:
    """The axes of the plot, by their titles from left to right, with what stands at their ticks."""
    read = """
        return [...document.querySelectorAll('.pcp-plot .y-axis')].map(axis => [
            axis.querySelector('.axis-title').textContent,
            [...axis.querySelectorAll('.tick text')].map(tick => tick.textContent),
        ]);
    """
    return dict(driver.execute_script(read))


def choose(driver: webdriver.Chrome, wait: WebDriverWait) -> None:
    """Asks for the score alone; the parameters that differ, and the names of the runs, are there by themselves."""
    wait.until(lambda _: set(AXES[:2]) <= axes(driver).keys(), "the parameters of the trials are no axes")
    close_panel(driver)
    for unwanted in ("run.name", "train/loss"):
        click(wait, f"//span[text()='{unwanted}']/following-sibling::span[@unselectable]")
    click(wait, "//div[.='Metrics:']/following-sibling::div[1]")
    click(wait, f"//*[contains(@class, 'select-item-option')][.='{AXES[2]}']")
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)


def see_the_axes(driver: webdriver.Chrome, wait: WebDriverWait) -> None:
    """Mask ratio, decoder width and accuracy are axes of numbers over the range of the trials."""
    wait.until(lambda _: set(AXES) == axes(driver).keys(), "the axes are not those that were asked for")
    seen = axes(driver)
    ranges = (*zip(*TRIALS, strict=True), TRIALS.values())
    for name, values in zip(AXES, ranges, strict=True):
        ticks = [float(tick.replace("\u2212", "-")) for tick in seen[name]]
        assert ticks, name
        assert min(values) <= min(ticks) <= max(ticks) <= max(values), (name, ticks)
    if where := os.environ.get("MAE_SCREENSHOT_SEARCH"):
        driver.set_window_size(1280, 740)
        time.sleep(1)  # the lines are drawn after the axes
        assert driver.save_screenshot(where)
