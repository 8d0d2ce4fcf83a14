"""Two harmless tools for `--tools-demo`. Nothing that a model writes is run: calls are parsed, and so are formulas."""

import ast
import operator
from collections.abc import Callable
from datetime import datetime
from typing import Any

OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
LARGEST_EXPONENT, LARGEST_NUMBER, LONGEST = 64, 1e30, 200


def calculate(expression: str) -> str:
    """Calculates an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * / // % **, for example (3 + 4) * 2.5
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has more than {LONGEST} characters")
    try:
        return f"{_value(ast.parse(expression.strip(), mode='eval').body):.15g}"
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None


def current_time() -> str:
    """Tells the date and the time of now."""
    return datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z (%A)")


TOOLS: dict[str, Callable[..., str]] = {tool.__name__: tool for tool in (calculate, current_time)}


def call(name: str, arguments: dict[str, Any]) -> str:
    """What a tool answers, or what is wrong with the call."""
    if name not in TOOLS:
        return f"There is no tool {name}."
    try:
        return TOOLS[name](**arguments)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        return f"The call failed: {error}."


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _value(node.left), _value(node.right)
        if abs(exponent) > LARGEST_EXPONENT:
            raise ValueError(f"exponents beyond {LARGEST_EXPONENT} are not calculated")
        value = float(base) ** exponent
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError(f"{ast.unparse(node)} is no arithmetic")
    if not isinstance(value, int | float) or abs(value) > LARGEST_NUMBER:  # roots of negative numbers are complex
        raise ValueError("the result is too large, or no real number")
    return value
