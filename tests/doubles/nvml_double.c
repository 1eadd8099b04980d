/* A double of NVML for tests: two cards that were made up. The second is the one that tests look for; the first has no
   power meter, like a Jetson.

   Energy is the integral of power since the start, so that a counter and samples can agree.

   Compiled with -DNVML_DOUBLE_OLD it lacks what drivers before 535 lack. Environment: NVML_DOUBLE_STEPS
   ("1.0:200,3.0:100") are the watts from each second after the start on, 50 before; NVML_DOUBLE_START is the start by the
   monotonic clock, else when the library was loaded; NVML_DOUBLE_REASONS=72 are bits of what holds the clocks back;
   NVML_DOUBLE_FAIL=1 does not start. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9 };

struct memory { unsigned long long total, free, used; };
struct utilization { unsigned gpu, memory; };
struct pci { char legacy[16]; unsigned domain, bus, device, device_id, subsystem_id; char bus_id[32]; };
struct card { const char *name, *uuid, *bus_id; int has_meter; };

static struct card cards[] = {
    {"Card without a meter", "GPU-00000000-double", "00000000:01:00.0", 0},
    {"Card with a meter", "GPU-11111111-double", "00000000:B1:00.0", 1},
};
static double started;

static double now(void) {
    struct timespec stamp;
    clock_gettime(CLOCK_MONOTONIC, &stamp);
    return stamp.tv_sec + stamp.tv_nsec / 1e9;
}

static double setting(const char *name) { return getenv(name) ? atof(getenv(name)) : 0; }

/* Watts now, and the joules since the start, of the steps in the environment. */
static double draw(double *energy_j) {
    double since = 0, watts = 50, elapsed = now() - started, joules = 0;
    const char *text = getenv("NVML_DOUBLE_STEPS");
    double at, value;
    int length;
    while (text && sscanf(text, "%lf:%lf%n", &at, &value, &length) == 2 && at <= elapsed) {
        joules += watts * (at - since);
        since = at;
        watts = value;
        text += length + (text[length] == ',');
    }
    if (energy_j) *energy_j = joules + watts * (elapsed - since);
    return watts;
}

int nvmlInit_v2(void) {
    if (setting("NVML_DOUBLE_FAIL")) return DRIVER_NOT_LOADED;
    if (!started) started = getenv("NVML_DOUBLE_START") ? setting("NVML_DOUBLE_START") : now();
    return SUCCESS;
}
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int status) { return status == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "Unknown Error"; }

int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct card **card) {
    if (index > 1) return INVALID_ARGUMENT;
    *card = &cards[index];
    return SUCCESS;
}
int nvmlDeviceGetName(struct card *card, char *text, unsigned length) {
    snprintf(text, length, "%s", card->name);
    return SUCCESS;
}
int nvmlDeviceGetUUID(struct card *card, char *text, unsigned length) {
    snprintf(text, length, "%s", card->uuid);
    return SUCCESS;
}
int nvmlDeviceGetPciInfo_v3(struct card *card, struct pci *pci) {
    memset(pci, 0, sizeof *pci);
    strcpy(pci->bus_id, card->bus_id);
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(struct card *card, unsigned *milliwatts) {
    if (!card->has_meter) return NOT_SUPPORTED;
    *milliwatts = (unsigned)(draw(NULL) * 1000);
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(struct card *card, unsigned long long *millijoules) {
    double joules;
    if (!card->has_meter) return NOT_SUPPORTED;
    draw(&joules);
    *millijoules = 5000000000000ULL + (unsigned long long)(joules * 1000);
    return SUCCESS;
}
int nvmlDeviceGetEnforcedPowerLimit(struct card *card, unsigned *milliwatts) {
    *milliwatts = 300000;
    return card->has_meter ? SUCCESS : NOT_SUPPORTED;
}
int nvmlDeviceGetTemperature(struct card *card, int sensor, unsigned *degrees) {
    *degrees = 41;
    return sensor == 0 ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetClockInfo(struct card *card, int type, unsigned *mhz) {
    static const unsigned clocks[] = {1500, 1410, 2619};
    if (type < 0 || type > 2) return INVALID_ARGUMENT;
    *mhz = clocks[type];
    return SUCCESS;
}
int nvmlDeviceGetMaxClockInfo(struct card *card, int type, unsigned *mhz) {
    *mhz = 1980;
    return type == 1 ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetMemoryInfo(struct card *card, struct memory *memory) {
    memory->total = 8ULL << 30;
    memory->used = 3ULL << 30;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetUtilizationRates(struct card *card, struct utilization *utilization) {
    utilization->gpu = 87;
    utilization->memory = 12;
    return SUCCESS;
}
static int reasons(unsigned long long *bits) {
    *bits = (unsigned long long)setting("NVML_DOUBLE_REASONS");
    return SUCCESS;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(struct card *card, unsigned long long *bits) { return reasons(bits); }
#ifndef NVML_DOUBLE_OLD
int nvmlDeviceGetCurrentClocksEventReasons(struct card *card, unsigned long long *bits) { return reasons(bits); }
#endif
