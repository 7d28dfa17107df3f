"""Common code of the tests of the command line and the Python API."""

from maskrcnn.api.progress import Progress


def expect_error(result, *parts):
    code, _, err = result
    assert code == 1, err
    for word in ("Error: ", "\n  expected: ", "\n  fix:      ", *parts):
        assert word in err, err


class MessageLog(Progress):
    """Keeps the messages of an API call."""

    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)

    detail = message
