"""Texts to calibrate on and to measure perplexity on: one LightningDataModule per source, chosen with ``--data``."""

from plquant.data.base import EvaluationText as EvaluationText
from plquant.data.base import TextData as TextData
from plquant.data.builtin import BuiltinText as BuiltinText
from plquant.data.files import FileText as FileText
from plquant.data.generated import SelfGenerated as SelfGenerated
from plquant.data.hub import HubText as HubText
from plquant.data.ids import TokenIds as TokenIds

__all__ = ["BuiltinText", "EvaluationText", "FileText", "HubText", "SelfGenerated", "TextData", "TokenIds"]
