"""The pages before the notebook: for all eyes, on all screens."""

from collections.abc import Iterator

import pytest
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from support import Course, axe_violations, emulate, log_in, use, write

pytestmark = pytest.mark.root

NAMES = [
    "\u0644\u064a\u0644\u0649",
    "\u05e0\u05e2\u05de\u05d9",
    "\u82b1\u5b50",
    "A" * 60,
]  # Layla, Naomi, Hanako


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    directory = tmp_path_factory.mktemp("seen")
    settings = {"web_title": "Physics", "on_demand": "yes"}
    with Course(directory, len(NAMES), **settings) as course:
        rows = zip(course.students, NAMES)
        course.write_students(
            {"username": username, "name": name} for username, name in rows
        )
        course.check("setup")
        course.launch().wait_ready()
        yield course


def check_page(browser: WebDriver) -> None:
    """Assert that all can read the page at hand, which nobody has to scroll sideways."""
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.lang") == "en"
    assert len(browser.find_elements("css selector", "main h1")) == 1
    for width in (320, 1280):
        for scheme in ("light", "dark"):
            emulate(browser, width, scheme)
            assert axe_violations(browser) == [], f"{width} {scheme}"
            assert browser.execute_script(f"return {root}.scrollWidth") <= width


def test_the_pages_of_the_course_are_accessible(course: Course, browser: WebDriver) -> None:
    for path in ("", "nobody", "user-redirect/tree", "-password", "-certificate"):
        browser.get(course.url + path)
        use(browser, "h1", "Physics")
        # What those read whose browser opens no WebSocket.
        show = "document.querySelectorAll('[hidden], details').forEach(each =>"
        browser.execute_script(f"{show} {{ each.hidden = false; each.open = true; }})")
        check_page(browser)


def test_the_pages_of_a_notebook_are_accessible(course: Course, browser: WebDriver) -> None:
    username = course.students[0]
    browser.get(course.notebook_url(username))
    use(browser, "input[type=password]")
    check_page(browser)
    use(browser, "input[type=password]", "", write("wrong", Keys.ENTER))
    use(browser, "[role=alert]")
    check_page(browser)
    log_in(browser, course, username)
    use(browser, ".jp-DirListing")
    browser.get(course.notebook_url(username) + "logout")
    use(browser, "button", "Log out")
    check_page(browser)
    use(browser, "button", "Log out", WebElement.click)
    use(browser, "h2", "You have logged out")
    check_page(browser)


def test_the_page_that_waits_for_a_notebook_is_accessible(
    course: Course, browser: WebDriver
) -> None:
    username = course.students[0]
    browser.get(course.url + username)
    use(browser, "input[type=password]")
    server = course.server(username)
    server.suspend()
    try:
        browser.get(course.url + username)
        browser.execute_script("window.stop()")  # it asks again each second
        use(browser, "p", "Your notebook is being started")
        check_page(browser)
    finally:
        server.resume()
