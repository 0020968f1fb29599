"""What is over is forgotten with the second call after it, and not before."""

from pycopy.session.leaving import Leaving


def test_each_stays_for_two_calls():
    leaving = Leaving()
    leaving.add(b"first")
    assert leaving.forget() == []
    leaving.add(b"second")
    assert leaving.forget() == [b"first"]
    assert leaving.forget() == [b"second"]
    assert leaving.forget() == []


def test_what_begins_anew_is_not_forgotten():
    leaving = Leaving()
    leaving.add(b"old")
    leaving.forget()
    leaving.add(b"new")
    assert leaving.withdraw(b"old") and leaving.withdraw(b"new")
    assert not leaving.withdraw(b"old") and not leaving.withdraw(b"never")
    assert leaving.forget() == leaving.forget() == []


def test_what_ends_again_begins_to_wait_again():
    leaving = Leaving()
    leaving.add(b"key")
    leaving.forget()
    leaving.add(b"key")
    assert leaving.forget() == []
    assert leaving.forget() == [b"key"]
