"""Compilation is an option that changes the speed and nothing else."""

import copy
import warnings
import zipfile

import cloudpickle
import numpy as np
import pytest
import torch as th

from sb3_dqs import DQS
from sb3_dqs.fast import Compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
def test_compiled_training_is_that_without_up_to_rounding(make_model):
    parameters = []
    for compile in (False, True):
        model = make_model(compile=compile, learning_starts=40)
        model.sampling_dtype = None  # in bfloat16 rounding would show
        model.learn(45)
        if compile:  # it was used, and did not fail
            assert model.compiled_sampler.compiled is not None and model.compiled_sampler.is_possible
        parameters.append(model.policy.parameters_to_vector())
    assert np.abs(parameters[0]).max() > 0.1
    np.testing.assert_allclose(*parameters, atol=1e-4)


def test_nothing_of_it_is_saved(make_model, tmp_path):
    names = []
    for compile in (False, True):
        make_model(compile=compile).save(tmp_path / "model.zip")
        with zipfile.ZipFile(tmp_path / "model.zip") as archive:
            names.append(archive.namelist())
            assert b"compiled_sampler" not in archive.read("data")
    assert names[0] == names[1]
    assert DQS.load(tmp_path / "model.zip").compiled_sampler is not None
    assert DQS.load(tmp_path / "model.zip", compile=False).compiled_sampler is None


def test_it_is_compiled_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: compiled.append(function) or function)
    double = Compiled(lambda x: 2 * x)
    assert [double(1), double(2)] == [2, 4] and len(compiled) == 1


def test_copies_of_a_model_sample_with_their_own_actor(make_model, monkeypatch):
    actors = []
    monkeypatch.setattr(
        th, "compile", lambda function, **kwargs: actors.append(function.__self__) or (lambda *args: function(*args))
    )
    model = make_model(compile=True)
    sampler, arguments = model.compiled_sampler, (th.zeros(1, 8), th.zeros(1, 1), [1])
    sampler(*arguments)
    for other in (copy.deepcopy(sampler), cloudpickle.loads(cloudpickle.dumps(sampler))):
        other(*arguments)
    assert actors[0] is model.actor and len({id(actor) for actor in actors}) == 3
    copied = copy.deepcopy(model)
    assert copied.compiled_sampler.function.__self__ is copied.actor


@pytest.mark.parametrize("message", ["no compiler", "backend='inductor' raised:\nInvalidCxxCompiler: no compiler"])
def test_what_cannot_be_compiled_runs_uncompiled_after_one_warning(monkeypatch, message):
    def fails_at_once(*args, **kwargs):
        raise RuntimeError(message + "\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

    monkeypatch.setattr(th, "compile", fails_at_once)
    double = Compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match=r"compile=True(.|\n)*no compiler\)"):
        assert double(th.tensor(1.0)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(th.tensor(2.0)) == 4


def test_what_fails_when_it_is_called_too(monkeypatch):
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: lambda x: 1 / 0)
    double = Compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert double(th.tensor(1.0)) == 2


def test_errors_of_the_function_itself_are_raised_and_not_taken_for_those_of_the_compiler(monkeypatch):
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: function)
    number = Compiled(int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="invalid literal"):
            number("bad")
    assert number("1") == 1 and number.is_possible
