"""Chapters as a learner meets them: JupyterLab and a real browser. Runs all cells, moves each widget, sees the figure change, and bears no error in the console."""
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "nbs/learn").glob("*.ipynb"))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")
# what JupyterLab itself says where there is no internet, or no such file yet
OF_JUPYTER = re.compile(r"favicon|/lab/api/workspaces|/lab/api/translations|api/contents/.*\?content=0|lab/extensions|ERR_INTERNET_DISCONNECTED|api/me|lab/api/news|lsp", re.I)

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; pip install playwright")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium is installed; apt-get install chromium")]


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """The address of a JupyterLab in a folder with the chapters."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs/learn", home / "learn", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"JUPYTER_CONFIG_DIR": home / "config", "JUPYTER_DATA_DIR": home / "data", "JUPYTER_RUNTIME_DIR": home / "runtime", "IPYTHONDIR": home / "ipython", "JUPYTERLAB_SETTINGS_DIR": home / "settings",
                "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces", "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
                               f"--ServerApp.root_dir={home / 'learn'}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=", "--LabApp.extension_manager=readonly"],
                              env={**os.environ, **{name: str(value) for name, value in settings.items()}}, stdout=open(home / "server.log", "w"), stderr=subprocess.STDOUT, start_new_session=True)
    address, end = f"http://127.0.0.1:{port}", time.time() + 90
    while True:
        try: urllib.request.urlopen(f"{address}/api", timeout=5); break
        except OSError:
            if server.poll() is not None or time.time() > end: raise RuntimeError("JupyterLab did not start:\n" + (home / "server.log").read_text()[-2000:]) from None
            time.sleep(.3)
    yield address
    server.terminate()
    try: server.wait(20)
    except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=BROWSER, args=list(QUIET))
        yield one
        one.close()


def opened(browser, jupyter, name):
    """A chapter whose cells have all run, and what the console said."""
    page, said = browser.new_page(viewport={"width": 1280, "height": 1000}), []
    page.on("console", lambda message: said.append(f"{message.text} {message.location.get('url', '')}") if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"{jupyter}/lab/tree/{name}?reset")
    page.wait_for_function("() => { const w = window.jupyterapp?.shell?.currentWidget; return w && w.sessionContext && w.sessionContext.isReady && w.sessionContext.session?.kernel?.status === 'idle' }", timeout=90_000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function("""() => { const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code' && c.model.sharedModel.getSource().trim());
                                      const failed = cells.some(c => c.model.outputs.toJSON().some(o => o.output_type === 'error'));
                                      return failed || cells.every(c => c.model.executionCount !== null) }""", timeout=240_000)
    return page, said


def outputs(page):
    """All outputs of code cells: kind and text."""
    return page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code').flatMap(c => c.model.outputs.toJSON())
                            .map(o => [o.output_type, o.name || o.ename || '', o.text || o.evalue || ''])""")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_in_a_browser(path, jupyter, browser):
    page, said = opened(browser, jupyter, path.name)
    try:
        found = outputs(page)
        assert not [o for o in found if o[0] == "error" or o[1] == "stderr"], "a cell failed or warned"
        boxes = page.evaluate("""() => window.jupyterapp.shell.currentWidget.content.widgets.map((c, i) => [i, c]).filter(([i, c]) => c.model.type === 'code' &&
                                 c.model.outputs.toJSON().some(o => o.data && o.data['application/vnd.jupyter.widget-view+json'])).map(([i]) => i)""")
        assert boxes, "a chapter has a widget"
        for cell in boxes:
            page.evaluate("i => { const book = window.jupyterapp.shell.currentWidget.content; book.activeCellIndex = i; return book.scrollToItem(i, 'start') }", cell)
            here = page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{cell}']")
            here.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=30_000)
            handles, menus = here.locator(".noUi-handle"), here.locator("select")
            assert handles.count() + menus.count(), f"cell {cell}: nothing to move"
            for number in range(handles.count()): moves(page, here, lambda handle=handles.nth(number), number=number: press(handle), f"slider {number} of cell {cell}")
            for number in range(menus.count()): moves(page, here, lambda menu=menus.nth(number): choose(menu), f"menu {number} of cell {cell}")
        assert not (errors := [text for text in said if not OF_JUPYTER.search(text)]), errors[:5]
    finally: page.close()


def press(handle):
    """Moves a slider by a few steps, whichever way there is room."""
    handle.focus()
    low, high, now = (float(handle.get_attribute(f"aria-{name}")) for name in ("valuemin", "valuemax", "valuenow"))
    for _ in range(3): handle.press("ArrowLeft" if now > (low + high) / 2 else "ArrowRight")


def choose(menu):
    """Takes another word."""
    words = menu.locator("option").all_inner_texts()
    now = menu.evaluate("menu => menu.selectedIndex")
    menu.select_option(index=(now + 1) % len(words))


def moves(page, here, move, what):
    """The figure changes after a move, within seconds."""
    figure = here.locator(".js-plotly-plot").first
    shown = "figure => JSON.stringify([figure.data.map(t => { const {uid, ...rest} = t; return rest }), figure.layout.title, figure.layout.shapes, figure.layout.annotations, figure.layout.yaxis])"
    before = figure.evaluate(shown)
    move()
    end = time.time() + 20
    while time.time() < end:
        if figure.evaluate(shown) != before: return
        time.sleep(.2)
    raise AssertionError(f"{what} was moved, the figure did not change")
