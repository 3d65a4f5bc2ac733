"""Charts as SVG by hand: scales, grids, curves, dots and legends, in light and dark.

    axes = Axes(46, 56, 206, 160, (0, 10), span(values))     where the box is, and the ranges of x and y
    parts = axes.frame("title", "steps") + [axes.curve(range(11), values, "c0")]
    drawing(300, 260, parts, "what it shows")                a whole file

Every function gives SVG as text, and what follows is drawn over what comes before. Colours are classes: c0 to c7 draw
lines, f0 to f7 fill. `style` says what they look like, once for all drawings of a page.
"""
import html
import math

from data import mean

LIGHT = {"paper": "#ffffff", "ink": "#222222", "soft": "#666666", "grid": "#e3e3e3", "0": "#0072b2", "1": "#d55e00",
         "2": "#009e73", "3": "#b05590", "4": "#3d9bd9", "5": "#b98300", "6": "#777777", "7": "#8a5a2b"}
DARK = {"paper": "#0d1117", "ink": "#e6e6e6", "soft": "#a0a0a0", "grid": "#2c323a", "0": "#58b0f0", "1": "#ff8f4a",
        "2": "#35cfa5", "3": "#e59ac8", "4": "#a5d8ff", "5": "#f5c04e", "6": "#b0b0b0", "7": "#d0a577"}
COLORS = 8
LOOKS = """
text{font:12px system-ui,sans-serif;fill:var(--ink)} .soft{fill:var(--soft);font-size:11px} .head{font-weight:600}
.paper{fill:var(--paper)} .grid{stroke:var(--grid)} .zero{stroke:var(--soft)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round} .thin{stroke-width:1;opacity:.45}
.dash{stroke-dasharray:6 3} .dots{stroke-dasharray:2 2} .wide{stroke-width:7;opacity:.3} .mean{stroke-width:3}
"""


def style():
    """The CSS that all drawings share."""
    def variables(colors):
        said = "".join(f"--{name}:{color};" for name, color in colors.items())
        return f":root{{{said}}}"
    css = f"{variables(LIGHT)}\n@media (prefers-color-scheme:dark){{{variables(DARK)}}}{LOOKS}"
    for i in range(COLORS):
        css += f".c{i}{{stroke:var(--{i})}} .f{i}{{fill:var(--{i})}}\n"
    return css


def tag(name, *inside, **attributes):
    """An element of SVG or HTML. Attributes are escaped, what is inside is not. `look` is the class; _ stands for -."""
    words = [name]
    for key, value in attributes.items():
        key = "class" if key == "look" else key.strip("_").replace("_", "-")
        text = place(value) if type(value) is float else str(value)
        words.append(f'{key}="{html.escape(text)}"')
    if not inside and name in ("line", "circle", "polyline", "rect"):
        return f"<{' '.join(words)}/>"
    return f"<{' '.join(words)}>{''.join(inside)}</{name}>"


def place(value):
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def drawing(width, height, parts, about):
    """A whole SVG file. It has its own background: an <img> sees the reader's colour scheme, but not the page's."""
    back = tag("rect", look="paper", width=width, height=height)
    title = tag("title", html.escape(about))
    inside = "\n".join(["", title, tag("style", style()), back, *parts, ""])
    return tag("svg", inside, xmlns="http://www.w3.org/2000/svg", width=width, height=height,
               viewBox=f"0 0 {width} {height}", role="img") + "\n"


def line(x1, y1, x2, y2, look):
    return tag("line", look=look, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))


def dot(x, y, look):
    return tag("circle", look=look, cx=float(x), cy=float(y), r=2.5)


def words(x, y, text, look="soft", anchor="start"):
    return tag("text", html.escape(text), look=look, x=float(x), y=float(y), text_anchor=anchor)


def legend(x, y, apart, entries):
    """Side by side, a line and what it stands for: {text: look}."""
    parts = []
    for text, look in entries.items():
        parts.append(line(x, y - 4, x + 24, y - 4, look))
        parts.append(words(x + 30, y, text))
        x += apart
    return parts


# ---------------------------------------------------------------- scales

def ticks(low, high, about=4):
    """Round numbers from low to high, not many more than `about`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = 10 * power
    for times in (5, 2, 1):
        if times * power >= 0.9 * rough:
            step = times * power
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def span(values):
    """The range of an axis that shows these values, with a little air."""
    low, high = min(values), max(values)
    air = (high - low) * 0.06 or abs(low) * 0.1 or 1.0
    return low - air, high + air


class Axes:
    """A box of a drawing with two scales: values in, pixels out. x_log: the x axis is that of log x."""

    def __init__(self, left, top, width, height, x_range, y_range, x_log=False):
        self.left, self.top = left, top
        self.width, self.height = width, height
        self.right, self.bottom = left + width, top + height
        self.x_range, self.y_range, self.x_log = x_range, y_range, x_log

    def x(self, value):
        low, high = self.x_range
        if self.x_log:
            value, low, high = map(math.log, (value, low, high))
        return self.left + self.width * (value - low) / (high - low or 1)

    def y(self, value):
        low, high = self.y_range
        return self.top + self.height * (high - value) / (high - low)

    def x_axis(self, label, values, zero=False):
        """Grid and numbers along x; zero: mark where it is 0."""
        parts = [words(self.left + self.width / 2, self.bottom + 30, label, anchor="middle")]
        for value in values:
            x = self.x(value)
            look = "zero" if zero and value == 0 else "grid"
            parts.append(line(x, self.top, x, self.bottom, look))
            parts.append(words(x, self.bottom + 15, f"{value:g}", anchor="middle"))
        return parts

    def frame(self, title, x_label, x_ticks=None):
        """Title, grid and numbers of both axes."""
        parts = [words(self.left, self.top - 8, title, "head")]
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(line(self.left, y, self.right, y, "grid"))
            parts.append(words(self.left - 5, y + 4, f"{value:g}", anchor="end"))
        return parts + self.x_axis(x_label, x_ticks or ticks(*self.x_range))

    def curve(self, xs, ys, look, *inside, **attributes):
        """A line through points."""
        points = []
        for x, y in zip(xs, ys):
            points.append(place(self.x(x)) + "," + place(self.y(y)))
        return tag("polyline", *inside, look=look, points=" ".join(points), **attributes)

    def seeds_and_mean(self, xs_of_seed, ys_of_seed, look):
        """A thin line a seed, and a thick one through the means of their first points, of their second ones, ..."""
        parts = []
        for xs, ys in zip(xs_of_seed, ys_of_seed):
            if len(ys_of_seed) > 1:
                parts.append(self.curve(xs, ys, f"{look} thin"))
        mean_x, mean_y = map(mean, zip(*xs_of_seed)), map(mean, zip(*ys_of_seed))
        return [*parts, self.curve(mean_x, mean_y, look)]
