"""The twin's MuJoCo scene, written from primitives: arm from its DH table, table, seven objects, one camera.

One model serves every scene; objects that take no part are parked out of sight without collisions (see ``piper``).
What makes grasping reliable without welds: elliptic friction cones with ``impratio`` 5, ``implicitfast`` integration,
box fingers with a stiff contact, 12 N of finger force and objects of 20 to 60 g.
"""

from __future__ import annotations

import math

from rawdream_env.piper import geometry as geo
from rawdream_env.piper.relations import OBJECTS, POT_HANDLE, SHAPES

TIMESTEP = 0.004
_FINGER_TRAVEL = geo.MAX_OPENING / 2
_NO_CONTACT = 'contype="0" conaffinity="0"'


def _geom(kind: str, size: tuple[float, ...], rgba: str, mass: float, pos: tuple[float, ...] = (0, 0, 0)) -> str:
    return (
        f'<geom type="{kind}" size="{" ".join(map(str, size))}" pos="{" ".join(map(str, pos))}" '
        f'rgba="{rgba}" mass="{mass}"/>'
    )


def _container(name: str, sides: int, floor_rgba: str, wall_rgba: str, floor_mass: float) -> str:
    """A floor disc with a ring of boxes on it. Only the floor touches the table: a ring would add 4 contacts a box."""
    shape = SHAPES[name]
    radius, half_height = shape.half[0], shape.half[2]
    wall = radius - shape.inner_radius
    floor_half = (half_height + shape.floor_z) / 2
    out = _geom("cylinder", (radius - 0.002, floor_half), floor_rgba, floor_mass, (0, 0, -half_height + floor_half))
    low = -half_height + 0.001
    width = radius * math.tan(math.pi / sides) + 0.001
    for i in range(sides):
        angle = 2 * math.pi * i / sides
        middle = radius - wall / 2
        out += (
            f'<geom type="box" size="{wall / 2} {width} {(half_height - low) / 2}" euler="0 0 {angle}" mass="0.004" '
            f'pos="{middle * math.cos(angle)} {middle * math.sin(angle)} {(half_height + low) / 2}" '
            f'rgba="{wall_rgba}"/>'
        )
    return out


def _decal(radius: float, z: float, rgba: str) -> str:
    return f'<geom type="cylinder" size="{radius} 0.0005" pos="0 0 {z}" rgba="{rgba}" mass="0.0001" {_NO_CONTACT}/>'


def _ballast() -> str:
    """A hidden weight that moves the centre of mass half a millimetre off the axis of a round object.

    Standing perfectly upright (tilt below 1e-15) a cylinder's contact with a plane degenerates and it falls over.
    """
    return f'<geom type="box" size="0.002 0.002 0.002" pos="0.012 0 0" mass="0.002" group="4" {_NO_CONTACT}/>'


def _object_geoms() -> dict[str, str]:
    handle_pos, handle_half = POT_HANDLE
    return {
        "blue_block": _geom("box", SHAPES["blue_block"].half, ".1 .25 .95 1", 0.03),
        "red_block": _geom("box", SHAPES["red_block"].half, ".9 .1 .1 1", 0.05),
        "pot": _container("pot", 10, ".55 .57 .62 1", ".62 .65 .7 1", 0.04)
        + _geom("box", handle_half, ".05 .05 .05 1", 0.004, handle_pos),
        "stove": _geom("box", SHAPES["stove"].half, ".15 .15 .17 1", 1.0) + _decal(0.04, 0.0062, ".85 .3 .1 1"),
        "spoon": _geom("box", (0.033, 0.006, 0.006), ".75 .2 .75 1", 0.015, (0.0145, 0, 0))
        + _geom("ellipsoid", (0.016, 0.012, 0.006), ".6 .1 .6 1", 0.008, (-0.0315, 0, 0)),
        "bowl": _container("bowl", 12, ".95 .8 .2 1", "1 .85 .25 1", 0.05) + _ballast(),
        "cup": _geom("cylinder", (SHAPES["cup"].half[0], SHAPES["cup"].half[2]), ".1 .75 .3 1", 0.03)
        + _decal(0.013, 0.0201, ".03 .25 .1 1")
        + _ballast(),
    }


def _objects() -> str:
    out = ""
    for name, geoms in _object_geoms().items():
        if name == "stove":
            out += f'<body name="{name}" mocap="true" pos="0 0 -1">{geoms}</body>'
        else:
            out += f'<body name="{name}" pos="0 0 -1"><freejoint name="{name}"/>{geoms}</body>'
    if tuple(_object_geoms()) != OBJECTS:
        raise AssertionError("the model's objects must be in the order of OBJECTS")
    return out


def _link_frame(i: int) -> str:
    """Position and quaternion of DH frame ``i`` in its parent: Rx(alpha) [a, 0, d] and Rx(alpha) Rz(theta0)."""
    alpha, theta = geo.DH_ALPHA[i], geo.DH_THETA[i]
    z = math.cos(alpha) * geo.DH_D[i] + (geo.BASE_HEIGHT if i == 0 else 0.0)
    ca, sa, ct, st = math.cos(alpha / 2), math.sin(alpha / 2), math.cos(theta / 2), math.sin(theta / 2)
    return f'pos="{geo.DH_A[i]} {-math.sin(alpha) * geo.DH_D[i]} {z}" quat="{ca * ct} {sa * ct} {-sa * st} {ca * st}"'


def _arm() -> str:
    dark, light = ".2 .2 .22 1", ".92 .92 .95 1"
    inert = f'mass="0.1" {_NO_CONTACT}'
    looks = [
        f'<geom type="cylinder" size=".045 .05" pos="0 0 -.06" rgba="{dark}" {inert}/>'
        f'<geom type="sphere" size=".045" rgba="{light}" {inert}/>',
        f'<geom type="capsule" size=".032" fromto="0 0 0 {geo.DH_A[2]} 0 0" rgba="{light}" {inert}/>',
        f'<geom type="sphere" size=".036" rgba="{dark}" {inert}/>'
        f'<geom type="capsule" size=".027" fromto="0 0 0 {geo.DH_A[3]} -.06 0" rgba="{light}" {inert}/>',
        f'<geom type="capsule" size=".025" fromto="0 0 -.19 0 0 -.03" rgba="{light}" {inert}/>',
        f'<geom type="sphere" size=".030" rgba="{dark}" {inert}/>',
        f'<geom type="cylinder" size=".024 .03" pos="0 0 -.035" rgba="{light}" {inert}/>',
    ]
    out = ""
    for i, look in enumerate(looks):
        out += (
            f'<body name="link{i + 1}" gravcomp="1" {_link_frame(i)}><joint name="joint{i + 1}" axis="0 0 1" '
            f'range="{geo.JOINT_LOW[i]} {geo.JOINT_HIGH[i]}" limited="true" armature=".1" damping="2"/>{look}'
        )
    out += f'<site name="tool" pos="0 0 {geo.TCP_OFFSET}" size=".003" rgba="0 0 0 0"/>'
    out += f'<geom type="box" size=".03 .052 .022" pos="0 0 .022" rgba=".25 .25 .28 1" {inert}/>'
    half_length = (geo.TCP_OFFSET + geo.FINGER_OVERHANG - 0.045) / 2
    for name, side in (("finger_left", 1), ("finger_right", -1)):
        out += (
            f'<body name="{name}" pos="0 0 .045" gravcomp="1"><joint name="{name}" type="slide" axis="0 {side} 0" '
            f'range="0 {_FINGER_TRAVEL}" limited="true" armature=".05" damping="5"/><geom name="{name}" type="box" '
            f'size=".011 .005 {half_length}" pos="0 {0.005 * side} {half_length}" rgba=".95 .55 .1 1" mass=".05" '
            f'friction="1.5 .02 .002" solref=".005 1" solimp=".95 .99 .001"/></body>'
        )
    return out + "</body>" * len(looks)


def _actuators() -> str:
    out = "".join(
        f'<position name="joint{i + 1}" joint="joint{i + 1}" kp="600" kv="40" '
        f'ctrlrange="{geo.JOINT_LOW[i]} {geo.JOINT_HIGH[i]}"/>'
        for i in range(6)
    )
    for name in ("finger_left", "finger_right"):
        out += (
            f'<position name="{name}" joint="{name}" kp="300" kv="10" forcerange="-12 12" '
            f'ctrlrange="-.005 {_FINGER_TRAVEL}"/>'
        )
    return out


def scene_xml() -> str:
    """The whole scene as MJCF text."""
    base = geo.BASE_HEIGHT / 2 + 0.02
    return f"""<mujoco model="piper_tabletop">
<compiler angle="radian" inertiafromgeom="true"/>
<option timestep="{TIMESTEP}" integrator="implicitfast" cone="elliptic" impratio="5"/>
<visual><quality shadowsize="0" numslices="16" numstacks="8" numquads="1"/>
<headlight ambient=".45 .45 .45" diffuse=".5 .5 .5"/>
<global offwidth="640" offheight="640"/></visual>
<default><geom friction="1.0 .01 .001" condim="4" solref=".008 1"/></default>
<worldbody><light pos="0.3 .3 1.5" dir="0 0 -1" diffuse=".4 .4 .4"/>
<camera name="camera" pos="{" ".join(map(str, geo.CAMERA_POSITION))}" xyaxes="{" ".join(map(str, geo.CAMERA_XYAXES))}"
 fovy="{geo.CAMERA_FOVY}"/>
<geom name="table" type="plane" size="2 2 .1" rgba=".78 .72 .64 1"/>
<geom type="cylinder" size=".06 {base}" pos="0 0 {base}" rgba=".2 .2 .22 1" {_NO_CONTACT}/>
{_objects()}{_arm()}</worldbody><actuator>{_actuators()}</actuator></mujoco>"""
