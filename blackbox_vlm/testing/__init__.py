"""Test tools for who writes a backend: two suites to inherit, run by pytest.

    from blackbox_vlm.testing import BackendConformance, FaultMatrix

    class TestMyBackend(BackendConformance):  # what the meter relies on
        def make_backend(self):
            return MyBackend(endpoint="http://127.0.0.1:8000")

    class TestItsFaults(FaultMatrix):  # for one that speaks to a server
        def make_remote(self, url, timeout, ca_file=None):
            return MyBackend(endpoint=url, timeout=timeout)

        def good_answer(self, body):
            return json.dumps({"scores": [0.7, 0.2, 0.1]}).encode()

`ScriptedServer` and the steps in `blackbox_vlm.testing.server` are for tests of one's own, and
`FakeClock` lets a meter wait without waiting.
"""

from blackbox_vlm.testing.clock import FakeClock
from blackbox_vlm.testing.conformance import BackendConformance
from blackbox_vlm.testing.matrix import FaultMatrix
from blackbox_vlm.testing.server import Act, Received, ScriptedServer

__all__ = ["Act", "BackendConformance", "FakeClock", "FaultMatrix", "Received", "ScriptedServer"]
