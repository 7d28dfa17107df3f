"""What tests of the command line expect of it."""


def expect_error(result, *parts):
    code, _, err = result
    assert code == 1, err
    for word in ("Error: ", "\n  expected: ", "\n  fix:      ", *parts):
        assert word in err, err
