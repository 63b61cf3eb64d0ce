"""Compilation is an option that changes the speed and nothing else."""

import warnings
import zipfile

import numpy as np
import pytest
import torch as th

from sb3_dqs import DQS
from sb3_dqs.compiled import Compiled


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler
def test_compiled_training_is_that_without_up_to_rounding(make_model):
    parameters = []
    for compile in (False, True):
        model = make_model(compile=compile, learning_starts=40)
        model.sampling_dtype = None  # in bfloat16 rounding would show
        model.learn(45)
        assert isinstance(model.sample_with_log_prob, Compiled) == compile
        if compile:
            assert model.sample_with_log_prob.is_possible
        parameters.append(model.policy.parameters_to_vector())
    assert np.abs(parameters[0]).max() > 0.1
    np.testing.assert_allclose(*parameters, atol=1e-4)


def test_nothing_of_it_is_saved(make_model, tmp_path):
    names = []
    for compile in (False, True):
        make_model(compile=compile).save(tmp_path / "model.zip")
        with zipfile.ZipFile(tmp_path / "model.zip") as archive:
            names.append(archive.namelist())
            assert b"sample_with_log_prob" not in archive.read("data")
    assert names[0] == names[1]
    assert isinstance(DQS.load(tmp_path / "model.zip").sample_with_log_prob, Compiled)
    assert not isinstance(DQS.load(tmp_path / "model.zip", compile=False).sample_with_log_prob, Compiled)


def test_what_cannot_be_compiled_runs_uncompiled_after_one_warning(monkeypatch):
    def fails_at_once(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(th, "compile", fails_at_once)
    double = Compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="compile=True.*no compiler"):
        assert double(th.tensor(1.0)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(th.tensor(2.0)) == 4


def test_what_fails_when_it_is_called_too(monkeypatch):
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: lambda x: 1 / 0)
    double = Compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        assert double(th.tensor(1.0)) == 2


@pytest.mark.filterwarnings("ignore:compile=True")
def test_errors_of_the_function_itself_are_raised(monkeypatch):
    monkeypatch.setattr(th, "compile", lambda function, **kwargs: function)
    with pytest.raises(ValueError, match="invalid literal"):
        Compiled(int)("bad")
