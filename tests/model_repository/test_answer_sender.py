"""The order of a question about a request and of its answer: Triton ends where one meets the other."""

import threading

from answer_sender import AnswerSender


def test_an_answer_waits_for_the_question_that_is_on_its_way():
    asked, may_answer, order = threading.Event(), threading.Event(), []

    def ask():
        asked.set()
        assert may_answer.wait(10)
        order.append("asked")
        return True

    sender = AnswerSender(ask)
    question = threading.Thread(target=sender.is_cancelled)
    answer = threading.Thread(target=sender.send, args=[lambda: order.append("sent")])
    question.start()
    assert asked.wait(10)
    answer.start()
    answer.join(0.1)
    assert order == [], "it must wait"
    may_answer.set()
    question.join()
    answer.join()
    assert order == ["asked", "sent"]


def test_nobody_asks_once_the_answer_is_sent():
    questions = []
    sender = AnswerSender(lambda: bool(questions.append(1)) or True)
    assert sender.is_cancelled()
    sender.send(lambda: None)
    assert not sender.is_cancelled()
    assert len(questions) == 1


def test_nobody_asks_once_sending_has_failed():
    sender = AnswerSender(lambda: True)
    try:
        sender.send(lambda: 1 / 0)
    except ZeroDivisionError:
        assert not sender.is_cancelled()
