"""Pages of runs that never ran, and what is in them."""

import base64
import html.parser
import json

import numpy as np

from chinchilla_jax.experiments import page, report

EVIL = "</script><script>window.pwned = 1</script><!--<img src=x onerror='window.pwned = 2'>"


def numbers(text: str) -> dict:
  """The JSON in a page, as a browser's parser finds it."""
  class Finder(html.parser.HTMLParser):
    inside, found = False, ""

    def handle_starttag(self, tag, attrs):
      self.inside = tag == "script" and ("id", "data") in attrs

    def handle_endtag(self, tag):
      self.inside = False

    def handle_data(self, data):
      self.found += data if self.inside else ""

  finder = Finder()
  finder.feed(text)
  return json.loads(finder.found)


def decoded(text: str, dtype: str) -> np.ndarray:
  return np.frombuffer(base64.b64decode(text), dtype)


def rendered(*folders, **options) -> str:
  return page.render(report.read([str(folder) for folder in folders]), "now", **options)
