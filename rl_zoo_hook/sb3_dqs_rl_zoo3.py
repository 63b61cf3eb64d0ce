"""
Makes ``python -m rl_zoo3.train --algo dqs`` work: RL Zoo has no plugin mechanism, and this module stands in for one.

``sb3_dqs_rl_zoo3.pth`` (for Python >= 3.15 ``sb3_dqs_rl_zoo3.start``) calls ``install()`` when the interpreter starts.
It puts one finder on ``sys.meta_path``, which finds nothing itself: when a process imports one of the three modules of
RL Zoo named below, the finder lets the others find it, and once it has run, adds DQS to it
(see ``sb3_dqs/rl_zoo.py``, imported only then). Without rl_zoo3 nothing happens. No file is written, no other module
is touched. The environment variable SB3_DQS_NO_RL_ZOO (any value but the empty one) turns it off.

It runs at every start of the interpreter, so it imports nothing that Python has not loaded by then.
"""

import os
import sys

MODULES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")
OPT_OUT = "SB3_DQS_NO_RL_ZOO"


class RegisteringFinder:
    """Finder of ``sys.meta_path`` that asks the other finders, and has DQS registered in what they find."""

    def __init__(self):
        self.searching = set()  # other finders may ask all of sys.meta_path, too
        self.has_warned = False

    def find_spec(self, name, path=None, target=None):
        """As ``importlib.abc.MetaPathFinder.find_spec``."""
        if name not in MODULES or name in self.searching:
            return None
        self.searching.add(name)
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.searching.discard(name)
        if spec is not None:
            self.attempt(self.wrap, spec.loader, name)
        return spec

    def wrap(self, loader, name):
        """
        Have DQS registered after the module has run. The loader keeps its type, only this instance is changed.

        :param loader: loader of the module
        :param name: name of the module (a loader may serve several, of a zip file for instance)
        """
        exec_module = loader.exec_module
        if name in getattr(exec_module, "registers", ()):
            return

        def exec_and_register(module):
            exec_module(module)
            if module.__name__ == name:
                self.attempt(self.register, module)

        exec_and_register.registers = (name, *getattr(exec_module, "registers", ()))  # type: ignore[attr-defined]
        loader.exec_module = exec_and_register

    def register(self, module):
        """
        Add DQS to a module of RL Zoo that has run.

        :param module: one of ``MODULES``
        """
        module.__sb3_dqs__ = True
        from sb3_dqs import rl_zoo

        rl_zoo.register(module)

    def attempt(self, function, *arguments):
        """
        Call a function; if it fails, warn once: other algorithms must go on working.

        :param function: what to call
        :param arguments: with what
        """
        try:
            function(*arguments)
        except Exception as error:
            if not self.has_warned:
                self.has_warned = True
                import warnings

                message = (
                    f"sb3-dqs could not add DQS to rl_zoo3 ({type(error).__name__}: {error}); other algorithms are not "
                    f"affected. Set {OPT_OUT}=1 to silence this, or reinstall sb3-dqs."
                )
                try:
                    warnings.warn(message, RuntimeWarning, stacklevel=2)
                except RuntimeWarning:  # python -W error
                    print(message, file=sys.stderr)


FINDER = RegisteringFinder()


def install():
    """Put the finder in place, once; modules of RL Zoo that have run already get DQS at once."""
    if os.environ.get(OPT_OUT) or FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, FINDER)
    for name in MODULES:
        module = sys.modules.get(name)
        has_run = module is not None and not getattr(module.__spec__, "_initializing", False)
        if has_run and not hasattr(module, "__sb3_dqs__"):
            FINDER.attempt(FINDER.register, module)
