// Stands in for the toolkit header of the same name in the emulated build.
#pragma once
#include "half_types.h"
