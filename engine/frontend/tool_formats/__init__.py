"""How models write calls of tools: a file a format, with its grammar and its parser."""

from engine.frontend.tool_formats.deepseek import DEEPSEEK_V3, DEEPSEEK_V31
from engine.frontend.tool_formats.gemma import FUNCTION_GEMMA, GEMMA4
from engine.frontend.tool_formats.harmony import HARMONY
from engine.frontend.tool_formats.hermes import HERMES
from engine.frontend.tool_formats.llama3_json import LLAMA3_JSON
from engine.frontend.tool_formats.mistral import MISTRAL, MISTRAL_NAMED
from engine.frontend.tool_formats.pythonic import LFM2, PYTHONIC

TOOL_FORMATS = {
    tool_format.name: tool_format
    for tool_format in (
        HERMES,
        LLAMA3_JSON,
        MISTRAL,
        MISTRAL_NAMED,
        GEMMA4,
        FUNCTION_GEMMA,
        DEEPSEEK_V3,
        DEEPSEEK_V31,
        HARMONY,
        PYTHONIC,
        LFM2,
    )
}
