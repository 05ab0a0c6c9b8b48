"""The page that turns a key, or a name and password, into a cookie; works without scripts."""

import html
from urllib.parse import quote

LOGIN_PATH = "/-/login"


def login_page(target: str, *, asks_key: bool, asks_person: bool, problem: str = "") -> bytes:
    """The page as HTML, light or dark as the browser likes.

    Args:
        target: local path to go to afterwards.
        asks_key, asks_person: what opens the server; with both, either does.
        problem: a sentence about the last try.
    """
    alert = f'<p role="alert">{html.escape(problem)}</p>' if problem else ""
    action = f"{LOGIN_PATH}?next={quote(target, safe='/')}"
    required = "" if asks_key and asks_person else " required"
    fields = (_PERSON_FIELDS if asks_person else "") + (_KEY_FIELDS if asks_key else "")
    question = {
        (True, False): "This server needs an API key.",
        (False, True): "This server needs a name and a password.",
    }.get((asks_key, asks_person), "This server needs a name and a password, or an API key.")
    page = _HTML.replace("{question}", question).replace("{fields}", fields.replace("{required}", required))
    return page.replace("{action}", html.escape(action)).replace("{alert}", alert).encode()


def local_target(target: str) -> str:
    """A path on this server; anything that could lead elsewhere becomes the start page."""
    safe = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isascii() and target.isprintable()
    return target if safe else "/"


_PERSON_FIELDS = """<input name="username" autocomplete="username"{required} autofocus aria-label="Name"
 placeholder="Name">
<input name="password" type="password" autocomplete="current-password"{required} aria-label="Password"
 placeholder="Password">
"""
_KEY_FIELDS = """<input id="key" name="key" type="password" autocomplete="current-password"{required} aria-label="Key"
 placeholder="Key">
"""
_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Focale</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>
body{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0}
form{width:min(20rem,85vw);display:grid;gap:.75rem}h1{font-size:1.4rem;margin:0}p{margin:0}
input,button{font:inherit;padding:.6rem .7rem;border-radius:.5rem;border:1px solid #8888}
button{background:#4f46e5;color:#fff;border:0;cursor:pointer}[role=alert]{color:#d33}
</style></head><body><form method="post" action="{action}"><h1>Focale</h1>
<p>{question}</p>{alert}
{fields}<button>Enter</button></form></body></html>
"""
