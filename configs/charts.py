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

PALETTE = {     # {name: (on a light page, on a dark one)}; 0 to 7 are for curves
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#222222", "#e6e6e6"),
    "soft": ("#666666", "#a0a0a0"),
    "grid": ("#e3e3e3", "#2c323a"),
    "0": ("#0072b2", "#58b0f0"),
    "1": ("#d55e00", "#ff8f4a"),
    "2": ("#009e73", "#35cfa5"),
    "3": ("#b05590", "#e59ac8"),
    "4": ("#3d9bd9", "#a5d8ff"),
    "5": ("#b98300", "#f5c04e"),
    "6": ("#777777", "#b0b0b0"),
    "7": ("#8a5a2b", "#d0a577"),
}
COLORS = 8      # of curves
LOOKS = """
text{font:12px system-ui,sans-serif;fill:var(--ink)} .soft{fill:var(--soft);font-size:11px} .head{font-weight:600}
.paper{fill:var(--paper)} .grid{stroke:var(--grid)} .zero{stroke:var(--soft)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round} .thin{stroke-width:1;opacity:.45}
.dash{stroke-dasharray:6 3} .dots{stroke-dasharray:2 2} .wide{stroke-width:7;opacity:.3} .mean{stroke-width:3}
"""


def style():
    """The CSS that all drawings share."""
    light = dark = ""
    for name, (on_light, on_dark) in PALETTE.items():
        light += f"--{name}:{on_light};"
        dark += f"--{name}:{on_dark};"
    css = ":root{" + light + "}\n@media (prefers-color-scheme:dark){:root{" + dark + "}}" + LOOKS
    for i in range(COLORS):
        css += ".cN{stroke:var(--N)} .fN{fill:var(--N)}\n".replace("N", str(i))
    return css


def tag(name, *inside, **attributes):
    """An element of SVG or HTML. Attributes are escaped, what is inside is not. `look` is the class; _ stands for -."""
    begin = name
    for key, value in attributes.items():
        key = "class" if key == "look" else key.replace("_", "-")
        text = value if isinstance(value, str) else pixels(value)
        begin += f' {key}="{html.escape(text)}"'
    if name in SHAPES and not inside:
        return f"<{begin}/>"
    content = "".join(inside)
    return f"<{begin}>{content}</{name}>"


SHAPES = ("line", "circle", "polyline", "rect")     # which alone may be empty: HTML has no <div/>


def pixels(value):
    """A coordinate or a length as text, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def drawing(width, height, parts, about):
    """A whole SVG file. It has its own background: an <img> sees the reader's colour scheme, but not the page's."""
    back = tag("rect", look="paper", width=width, height=height)
    title = tag("title", html.escape(about))
    lines = ["", title, tag("style", style()), back, *parts, ""]
    return tag("svg", "\n".join(lines), xmlns="http://www.w3.org/2000/svg", width=width, height=height,
               viewBox=f"0 0 {width} {height}", role="img") + "\n"


def line(x1, y1, x2, y2, look):
    return tag("line", look=look, x1=x1, y1=y1, x2=x2, y2=y2)


def dot(x, y, look):
    return tag("circle", look=look, cx=x, cy=y, r=2.5)


def words(x, y, text, look="soft", anchor="start"):
    """A text on the line y; anchor: whether x is its start, its middle or its end."""
    text = html.escape(text)
    return tag("text", text, look=look, x=x, y=y, text_anchor=anchor)


def legend(x, y, apart, entries):
    """Side by side, a line and what it stands for: {text: look}."""
    parts = []
    middle = y - 4      # of the letters, which stand on y
    for text, look in entries.items():
        parts.append(line(x, middle, x + 24, middle, look))
        parts.append(words(x + 30, y, text))
        x += apart
    return parts


# ---------------------------------------------------------------- scales

def ticks(low, high, about=4):
    """Round numbers from low to high, not many more than `about`: steps of 1, 2 or 5 times a power of ten."""
    wanted = (high - low) / about
    power = 10.0 ** math.floor(math.log10(wanted))
    for times in (1, 2, 5, 10):
        step = times * power
        if step >= 0.9 * wanted:        # a tenth more ticks than asked for do no harm
            break
    rounding = 1e-9     # so that an end that is a tick, as 0.3 / 0.1 is nearly 3, has its number
    first = math.ceil(low / step - rounding)
    last = math.floor(high / step + rounding)
    return [round(i * step, 12) for i in range(first, last + 1)]    # 0.3, not 0.30000000000000004


def span(values):
    """The range of an axis that shows these values, with a little air."""
    low, high = min(values), max(values)
    air = (high - low) * 0.06
    if not air:     # all are the same
        air = abs(low) * 0.1 or 1.0
    return low - air, high + air


class Axes:
    """A box of a drawing with two scales: values in, pixels out, and the y of pixels grows downwards. x_log: the x axis
    is that of log x."""

    def __init__(self, left, top, width, height, x_range, y_range, x_log=False):
        self.left, self.top = left, top
        self.width, self.height = width, height
        self.right, self.bottom = left + width, top + height
        self.x_range, self.y_range, self.x_log = x_range, y_range, x_log

    def x(self, value):
        low, high = self.x_range
        if self.x_log:
            value, low, high = map(math.log, (value, low, high))
        length = high - low or 1        # a range of one value: it stands at the left
        return self.left + self.width * (value - low) / length

    def y(self, value):
        low, high = self.y_range
        return self.top + self.height * (high - value) / (high - low)

    def x_axis(self, label, values, zero=False):
        """Grid and numbers along x; zero: mark where it is 0."""
        middle = self.left + self.width / 2
        under = self.bottom + 15        # where the numbers stand; the label is a line further down
        parts = [words(middle, under + 15, label, anchor="middle")]
        for value in values:
            x = self.x(value)
            look = "zero" if zero and value == 0 else "grid"
            parts.append(line(x, self.top, x, self.bottom, look))
            parts.append(words(x, under, f"{value:g}", anchor="middle"))
        return parts

    def frame(self, title, x_label, x_ticks=None):
        """Title, grid and numbers of both axes."""
        parts = [words(self.left, self.top - 8, title, "head")]
        before = self.left - 5
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(line(self.left, y, self.right, y, "grid"))
            parts.append(words(before, y + 4, f"{value:g}", anchor="end"))
        return parts + self.x_axis(x_label, x_ticks or ticks(*self.x_range))

    def curve(self, xs, ys, look, *inside, **attributes):
        """A line through points."""
        points = []
        for x, y in zip(xs, ys):
            across, down = self.x(x), self.y(y)
            points.append(f"{pixels(across)},{pixels(down)}")
        return tag("polyline", *inside, look=look, points=" ".join(points), **attributes)

    def seeds_and_mean(self, xs_of_seed, ys_of_seed, look):
        """A thin line a seed, and a thick one through the means of their first points, of their second ones, ..."""
        parts = []
        if len(ys_of_seed) > 1:
            for xs, ys in zip(xs_of_seed, ys_of_seed):
                parts.append(self.curve(xs, ys, f"{look} thin"))
        mean_x = map(mean, zip(*xs_of_seed))
        mean_y = map(mean, zip(*ys_of_seed))
        return [*parts, self.curve(mean_x, mean_y, look)]
