"""The cases of the suite, by what they are about. Importing a module adds its cases."""

from __future__ import annotations
