"""A student's way, in a real browser: from the landing page to a computed cell."""

import contextlib
import json
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from conftest import CourseMaker
from support import (
    chromium,
    computes,
    log_in,
    save,
    saved_outputs,
    switch_to,
    use,
    wait_until,
    write,
)

pytestmark = pytest.mark.root


def saved_code(notebook: Path) -> list[str]:
    """Return the code cells in a notebook file; none while it is being written."""
    with contextlib.suppress(json.JSONDecodeError):
        cells = json.loads(notebook.read_text())["cells"]
        return [x["source"] for x in cells if x["cell_type"] == "code"]
    return []


def test_a_student_comes_from_the_landing_page_to_a_computed_cell(
    make_course: CourseMaker, browser: WebDriver
) -> None:
    course = make_course(2, web_title="Physics", on_demand="yes")
    course.check("setup")
    course.check("send")
    course.launch().wait_ready()
    username = course.students[1]
    browser.get(f"http://localhost:{course.port}/")
    wait_until(lambda: browser.current_url == course.url, 30, "TLS")
    assert browser.title == "Physics"
    use(browser, "li a", "Name2 Surname2", WebElement.click)
    log_in(browser, course, username)
    use(
        browser,
        ".jp-DirListing-item",
        "welcome.ipynb",
        lambda item: ActionChains(browser).double_click(item).perform(),
    )
    assert browser.current_url.startswith(course.notebook_url(username))
    wait_until(lambda: switch_to(browser, "/notebooks/"), 30, "the notebook's window")
    use(browser, ".jp-Notebook-ExecutionIndicator[data-status=idle]")
    wait_until(lambda: computes(browser, "sum(range(1, 101))", "5050"), 60, "5050")
    save(browser)
    notebook = course.home(username) / "course/material/welcome.ipynb"
    saved = wait_until(lambda: saved_outputs(notebook), 30, "the saved notebook")
    assert saved == ["5050"]
    assert notebook.owner() == username

    before = len(saved_code(notebook))
    ActionChains(browser).send_keys(Keys.ESCAPE, "b").pause(1).perform()  # a new cell
    course.server(username).kill()
    use(browser, ".jp-Dialog", "it lost its notebook server")
    use(browser, ".jp-Dialog button", "Ok", WebElement.click)
    save(browser)
    wait_until(lambda: len(saved_code(notebook)) > before, 30, "what was not saved before")


def test_the_field_leads_to_the_log_in_on_a_phone(make_course: CourseMaker) -> None:
    course = make_course(1, list_students="no", on_demand="yes")
    course.check("setup")
    course.launch().wait_ready()
    (username,) = course.students
    with chromium(390, 800) as phone:
        phone.get(course.url)
        width = phone.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390
        use(phone, "input", "", write("nobody", Keys.ENTER))
        use(phone, ".message", "Nobody here has this user name.")
        use(phone, "input", "", write(username.upper()))
        use(phone, "button", "", WebElement.click)
        log_in(phone, course, username)
        use(phone, ".jp-DirListing")
        assert phone.current_url.startswith(course.notebook_url(username))


def fits(browser: WebDriver) -> bool:
    root = "document.documentElement"
    fit: bool = browser.execute_script(
        f"return {root}.scrollWidth <= {root}.clientWidth && {root}.clientWidth == 360"
    )
    return fit


def test_the_log_in_page_says_whose_notebook_it_is_and_leads_back(
    make_course: CourseMaker,
) -> None:
    course = make_course(2, web_title="Physics <b>& more", on_demand="yes")
    rows = list(course.rows().values())
    rows[0]["name"] = "<script>document.title = 'taken'</script>Ada"
    rows[0]["surname"] = "A" * 60
    course.write_students(rows)
    course.check("setup")
    course.launch().wait_ready()
    username = course.students[0]
    with chromium(360, 700) as phone:
        phone.get(course.notebook_url(username) + "tree?at=home")
        use(phone, "h2", "Notebook of <script>document.title = 'taken'</script>Ada")
        use(phone, "code", username)
        use(phone, "h1", "Physics <b>& more")
        assert phone.title == "Physics <b>& more"
        use(phone, "body", "Type the password of your notebook, not that of your account.")
        assert fits(phone)
        use(phone, "a", "Not yours?", WebElement.click)
        wait_until(lambda: phone.current_url == course.url, 30, "the landing page")

        phone.get(course.notebook_url(username) + "tree?at=home")
        sys_pass = course.rows()[username]["sys-pass"]
        use(phone, "input[type=password]", "", write(sys_pass, Keys.ENTER))
        use(phone, "[role=alert]", "That was not the password of this notebook.")
        assert fits(phone)
        log_in(phone, course, username)
        wait_until(lambda: "tree?at=home" in phone.current_url, 30, "what was wanted")

        phone.get(course.notebook_url(username) + "logout")
        use(phone, "button", "Log out", WebElement.click)
        use(phone, "h2", "You have logged out of the notebook of")
        assert fits(phone)
        use(phone, "a", "Log in again", WebElement.click)
        use(phone, "input[type=password]")


def test_jupyterlab_asks_nobody_about_news(
    make_course: CourseMaker, browser: WebDriver
) -> None:
    course = make_course(1, on_demand="yes")
    course.check("setup")
    course.launch().wait_ready()
    (username,) = course.students
    browser.get(course.notebook_url(username) + "lab")
    log_in(browser, course, username)
    use(browser, ".jp-Launcher")
    with pytest.raises(TimeoutError):
        use(browser, ".Toastify__toast", "news", seconds=6)
