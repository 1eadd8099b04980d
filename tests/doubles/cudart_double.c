/* A double of the CUDA runtime for tests: no GPU, no driver. It proves plumbing, never that a kernel runs.

   Device memory is host memory behind a pointer that the host may not touch, as on a discrete GPU: it is mapped
   twice, once without any access (the device pointer) and once for this library. A stream is a thread that works
   off its queue in order, so what is asynchronous on a GPU is asynchronous here: who forgets to wait reads old
   bytes. An event notes the monotonic clock when its stream comes to it.

   Compiled with -DCUDART_DOUBLE_VERSION=10020 ... 13020; the symbols and signatures that changed follow it.

   Environment: CUDART_DOUBLE_FAIL=name:error[:call],... makes that function return the error from that call on
   (the first by default); CUDART_DOUBLE_MEMORY_MIB (8192), CUDART_DOUBLE_COMPUTE_CAPABILITY (8.7),
   CUDART_DOUBLE_INTEGRATED (0), CUDART_DOUBLE_MANAGED (1), CUDART_DOUBLE_DEVICES (1).

   What only the double has begins with cudartDouble: see the end of the file. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef CUDART_DOUBLE_VERSION
#define CUDART_DOUBLE_VERSION 12060
#endif

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DIRECTION = 21,
    NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_HANDLE = 400, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903, CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907, CAPTURE_WRONG_THREAD = 908
};

static const struct { int code; const char *name, *text; } ERRORS[] = {
    {SUCCESS, "cudaSuccess", "no error"},
    {INVALID_VALUE, "cudaErrorInvalidValue", "invalid argument"},
    {OUT_OF_MEMORY, "cudaErrorMemoryAllocation", "out of memory"},
    {NOT_INITIALIZED, "cudaErrorInitializationError", "initialization error"},
    {INVALID_DIRECTION, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {35, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
    {46, "cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"},
    {NO_DEVICE, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {209, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {214, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {INVALID_HANDLE, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {NOT_READY, "cudaErrorNotReady", "device not ready"},
    {ILLEGAL_ADDRESS, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {702, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {803, "cudaErrorSystemDriverMismatch", "system has unsupported display driver / cuda driver combination"},
    {804, "cudaErrorCompatNotSupportedOnDevice", "forward compatibility was attempted on non supported HW"},
    {CAPTURE_UNSUPPORTED, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "cudaErrorStreamCaptureUnmatched", "capture was not initiated in this stream"},
    {CAPTURE_ISOLATION, "cudaErrorStreamCaptureIsolation", "dependency created on uncaptured work in another stream"},
    {CAPTURED_EVENT, "cudaErrorCapturedEvent", "operation not permitted on an event last recorded in a capturing stream"},
    {CAPTURE_WRONG_THREAD, "cudaErrorStreamCaptureWrongThread", "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "cudaErrorUnknown", "unknown error"},
};

typedef int (*Work)(void *);
typedef struct Event Event;

typedef struct Op {
    enum { COPY, CALL, RECORD, WAIT } kind;
    char *to, *from, *staging;
    size_t bytes;
    Work work;
    void *argument;
    Event *event;
    unsigned long number;
    struct Op *next;
} Op;

struct Event {
    unsigned flags;
    int captured;
    unsigned long asked, done; /* how often it was recorded, and how often a stream came to it */
    double at_ms;
    Event *next;
};

typedef struct Graph {
    Op *first, **last;
    struct Graph *next;
} Graph;

typedef struct Stream {
    pthread_t thread;
    Op *first, **last;
    int busy, closing, blocking;
    Graph *capture;
    int invalidated, capture_mode;
    pthread_t captured_by;
    struct Stream *next;
} Stream;

enum { DEVICE = 1, PINNED = 2, MANAGED = 3 };

typedef struct Block {
    char *pointer, *alias; /* what the caller has, and where its bytes are */
    size_t bytes, mapped;
    int kind;
    struct Block *next;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Stream *streams;
static Event *events;
static Graph *graphs, *executables;
static Block *blocks;
static size_t used_bytes;
static int broken; /* an error that stays, such as an illegal address */
static pid_t owner;
static __thread int last_error;

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static long number_of(const char *name, const char *otherwise) { return atol(setting(name, otherwise)); }

/* The error that CUDART_DOUBLE_FAIL asks for at this call. */
static int injected(const char *name) {
    static struct { char name[48]; long calls; } counts[64];
    const char *spec = setting("CUDART_DOUBLE_FAIL", "");
    size_t length = strlen(name);
    int error = 0;
    for (const char *entry = spec; entry && *entry; entry = strchr(entry, ',')) {
        entry += *entry == ',';
        if (strncmp(entry, name, length) || entry[length] != ':') continue;
        long from = 1;
        int parsed = sscanf(entry + length, ":%d:%ld", &error, &from), slot = 0;
        while (counts[slot].name[0] && strcmp(counts[slot].name, name)) slot++;
        snprintf(counts[slot].name, sizeof counts[slot].name, "%s", name);
        if (parsed < 1 || ++counts[slot].calls < from) error = 0;
    }
    return error;
}

static int returned(int error) {
    if (error) last_error = error;
    return error;
}

/* Takes the lock and says what keeps the call from being made; CUDA cannot be used in a fork of its process. */
static int enter(const char *name) {
    pthread_mutex_lock(&lock);
    if (!owner) owner = getpid();
    if (owner != getpid()) return NOT_INITIALIZED;
    return broken ? broken : injected(name);
}

static int leave(int error) {
    pthread_mutex_unlock(&lock);
    return returned(error);
}

#define ENTER() do { int error_ = enter(__func__); if (error_) return leave(error_); } while (0)
#define REQUIRE(condition, error) do { if (!(condition)) return leave(error); } while (0)
#define FIND(type, list, handle) ({ type *at_ = list; while (at_ && at_ != (type *)(handle)) at_ = at_->next; at_; })
#define UNLINK(type, list, item) do { type **at_ = &list; while (*at_ != (item)) at_ = &(*at_)->next; *at_ = (item)->next; } while (0)

static Block *block_of(const void *pointer, size_t bytes) {
    const char *p = pointer;
    for (Block *block = blocks; block; block = block->next)
        if (p >= block->pointer && p + bytes <= block->pointer + block->bytes) return block;
    return NULL;
}

static int overlaps_device(const void *pointer, size_t bytes) {
    const char *p = pointer;
    for (Block *block = blocks; block; block = block->next)
        if (block->kind == DEVICE && p < block->pointer + block->mapped && p + bytes > block->pointer) return 1;
    return 0;
}

/* Streams */

static int perform(Op *op) {
    if (op->kind == COPY) memcpy(op->to, op->staging ? op->staging : op->from, op->bytes);
    return op->kind == CALL ? op->work(op->argument) : 0;
}

/* Runs one operation; the lock is held when it begins and ends, and free while bytes move. */
static void execute(Op *op) {
    if (op->kind == WAIT)
        while (op->event->done < op->number) pthread_cond_wait(&changed, &lock);
    if (op->kind == RECORD) {
        op->event->at_ms = now_ms();
        op->event->done = op->number;
    }
    if (op->kind == COPY || op->kind == CALL) {
        pthread_mutex_unlock(&lock);
        int error = perform(op);
        pthread_mutex_lock(&lock);
        if (error) broken = error;
    }
}

static void *work_off(void *argument) {
    Stream *stream = argument;
    pthread_mutex_lock(&lock);
    while (1) {
        while (!stream->first && !stream->closing) pthread_cond_wait(&changed, &lock);
        if (!stream->first) break;
        Op *op = stream->first;
        stream->first = op->next;
        if (!stream->first) stream->last = &stream->first;
        stream->busy = 1;
        execute(op);
        stream->busy = 0;
        free(op->staging);
        free(op);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static void drain(Stream *stream) {
    while (stream->first || stream->busy) pthread_cond_wait(&changed, &lock);
}

static void drain_all(int blocking_only) {
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->blocking || !blocking_only) drain(stream);
}

/* Puts a copy of the operation on the stream, or into the graph that it captures. Stream 0 waits for the others. */
static void push(Stream *stream, Op op) {
    if (!stream) {
        drain_all(1);
        execute(&op);
        free(op.staging);
        return;
    }
    Op *copy = malloc(sizeof op);
    *copy = op;
    copy->next = NULL;
    Op ***last = stream->capture ? &stream->capture->last : &stream->last;
    **last = copy;
    *last = &copy->next;
    pthread_cond_broadcast(&changed);
}

/* What must not be called while this thread captures: it invalidates the capture. */
static int capture_forbids(void) {
    int found = 0;
    for (Stream *stream = streams; stream; stream = stream->next)
        if (stream->capture && (stream->capture_mode == 0 || (stream->capture_mode == 1 && pthread_equal(stream->captured_by, pthread_self()))))
            found = stream->invalidated = 1;
    return found;
}

/* Versions, errors, the device */

int cudaRuntimeGetVersion(int *version) {
    *version = CUDART_DOUBLE_VERSION;
    return returned(injected(__func__));
}

int cudaDriverGetVersion(int *version) {
    *version = CUDART_DOUBLE_VERSION;
    return returned(injected(__func__));
}

int cudaGetLastError(void) {
    int error = last_error;
    last_error = broken;
    return error;
}

static int row_of(int code) {
    int count = sizeof ERRORS / sizeof *ERRORS;
    for (int row = 0; row < count; row++)
        if (ERRORS[row].code == code) return row;
    return count - 1;
}

const char *cudaGetErrorName(int code) { return ERRORS[row_of(code)].name; }
const char *cudaGetErrorString(int code) { return ERRORS[row_of(code)].text; }

int cudaGetDeviceCount(int *count) {
    ENTER();
    *count = number_of("CUDART_DOUBLE_DEVICES", "1");
    return leave(*count ? SUCCESS : NO_DEVICE);
}

int cudaSetDevice(int device) {
    ENTER();
    long count = number_of("CUDART_DOUBLE_DEVICES", "1");
    return leave(!count ? NO_DEVICE : device < 0 || device >= count ? INVALID_DEVICE : SUCCESS);
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER();
    REQUIRE(device >= 0 && device < number_of("CUDART_DOUBLE_DEVICES", "1"), INVALID_DEVICE);
    int major = 0, minor = 0;
    sscanf(setting("CUDART_DOUBLE_COMPUTE_CAPABILITY", "8.7"), "%d.%d", &major, &minor);
    switch (attribute) {
    case 13: *value = 1300000; break;
    case 16: *value = 16; break;
    case 18: *value = number_of("CUDART_DOUBLE_INTEGRATED", "0"); break;
    case 36: *value = 3199000; break;
    case 38: *value = 4 << 20; break;
    case 41: *value = 1; break;
    case 75: *value = major; break;
    case 76: *value = minor; break;
    case 83: *value = number_of("CUDART_DOUBLE_MANAGED", "1"); break;
    case 89: *value = !number_of("CUDART_DOUBLE_INTEGRATED", "0"); break;
    default: return leave(INVALID_VALUE);
    }
    return leave(SUCCESS);
}

int cudaDeviceGetPCIBusId(char *text, int size, int device) {
    ENTER();
    REQUIRE(device >= 0 && device < number_of("CUDART_DOUBLE_DEVICES", "1"), INVALID_DEVICE);
    snprintf(text, size, "0000:%02X:00.0", device + 1);
    return leave(SUCCESS);
}

int cudaDeviceSynchronize(void) {
    ENTER();
    REQUIRE(!capture_forbids(), CAPTURE_UNSUPPORTED);
    drain_all(0);
    return leave(broken);
}

/* Memory */

static size_t total_bytes(void) { return (size_t)number_of("CUDART_DOUBLE_MEMORY_MIB", "8192") << 20; }

int cudaMemGetInfo(size_t *free_bytes, size_t *all_bytes) {
    ENTER();
    *all_bytes = total_bytes();
    *free_bytes = *all_bytes - used_bytes;
    return leave(SUCCESS);
}

/* Device memory has an alias for this library, its pointer no access; other memory is its own alias. */
static int allocate(void **pointer, size_t bytes, int kind) {
    REQUIRE(pointer && bytes, INVALID_VALUE);
    REQUIRE(!capture_forbids(), CAPTURE_UNSUPPORTED);
    REQUIRE(used_bytes + bytes <= total_bytes(), OUT_OF_MEMORY);
    size_t page = sysconf(_SC_PAGESIZE), mapped = (bytes + page - 1) / page * page;
    int file = memfd_create("cudart_double", MFD_CLOEXEC);
    REQUIRE(file >= 0 && !ftruncate(file, mapped), OUT_OF_MEMORY);
    char *alias = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    char *shown = kind == DEVICE ? mmap(NULL, mapped, PROT_NONE, MAP_SHARED, file, 0) : alias;
    close(file);
    REQUIRE(alias != MAP_FAILED && shown != MAP_FAILED, OUT_OF_MEMORY);
    memset(alias, 0xA5, bytes); /* fresh memory is not zero */
    Block *block = malloc(sizeof *block);
    *block = (Block){shown, alias, bytes, mapped, kind, blocks};
    blocks = block;
    used_bytes += bytes;
    *pointer = shown;
    return leave(SUCCESS);
}

static int release(void *pointer, int pinned) {
    if (!pointer) return leave(SUCCESS);
    Block *block = block_of(pointer, 1);
    REQUIRE(block && block->pointer == pointer && (block->kind == PINNED) == pinned, INVALID_VALUE);
    REQUIRE(!capture_forbids(), CAPTURE_UNSUPPORTED);
    drain_all(0);
    UNLINK(Block, blocks, block);
    used_bytes -= block->bytes;
    munmap(block->alias, block->mapped);
    if (block->pointer != block->alias) munmap(block->pointer, block->mapped);
    free(block);
    return leave(SUCCESS);
}

int cudaMalloc(void **pointer, size_t bytes) { ENTER(); return allocate(pointer, bytes, DEVICE); }
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) { (void)flags; ENTER(); return allocate(pointer, bytes, PINNED); }
int cudaMallocManaged(void **pointer, size_t bytes, unsigned flags) {
    ENTER();
    REQUIRE(flags == 1 || flags == 2, INVALID_VALUE);
    REQUIRE(number_of("CUDART_DOUBLE_MANAGED", "1"), 801);
    return allocate(pointer, bytes, MANAGED);
}
int cudaFree(void *pointer) { ENTER(); return release(pointer, 0); }
int cudaFreeHost(void *pointer) { ENTER(); return release(pointer, 1); }

int cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    ENTER();
    Block *block = block_of(host, 1);
    REQUIRE(block && block->kind == PINNED && !flags, INVALID_VALUE);
    *device = host;
    return leave(SUCCESS);
}

/* Where the bytes behind a side of a copy are; NULL when that side cannot be read or written so. */
static char *side(const void *pointer, size_t bytes, int device, int *pageable) {
    Block *block = block_of(pointer, bytes);
    *pageable = !block;
    if (device) return block ? block->alias + ((const char *)pointer - block->pointer) : NULL;
    if (overlaps_device(pointer, bytes)) return NULL;
    return (char *)pointer;
}

static Stream *stream_of(void *handle) { return handle ? FIND(Stream, streams, handle) : NULL; }

/* Of pageable memory, a copy to the device is staged at once and one from it waits, as CUDA does. */
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *handle) {
    ENTER();
    Stream *stream = stream_of(handle);
    REQUIRE(stream || !handle, INVALID_HANDLE);
    REQUIRE(kind >= 0 && kind <= 4, INVALID_DIRECTION);
    int pageable_to, pageable_from;
    int device_to = kind == 1 || kind == 3, device_from = kind == 2 || kind == 3;
    if (kind == 4) device_to = block_of(to, bytes) != NULL, device_from = block_of(from, bytes) != NULL;
    Op op = {.kind = COPY, .bytes = bytes};
    op.to = side(to, bytes, device_to, &pageable_to);
    op.from = side(from, bytes, device_from, &pageable_from);
    REQUIRE(op.to && op.from, INVALID_VALUE);
    if (pageable_from && stream && !stream->capture) {
        op.staging = malloc(bytes ? bytes : 1);
        memcpy(op.staging, op.from, bytes);
    }
    push(stream, op);
    if (pageable_to && stream && !stream->capture) drain(stream);
    return leave(broken);
}

/* Streams and events */

int cudaStreamCreateWithFlags(void **handle, unsigned flags) {
    ENTER();
    REQUIRE(flags <= 1, INVALID_VALUE);
    Stream *stream = calloc(1, sizeof *stream);
    stream->last = &stream->first;
    stream->blocking = !flags;
    stream->next = streams;
    streams = stream;
    *handle = stream;
    return leave(pthread_create(&stream->thread, NULL, work_off, stream) ? OUT_OF_MEMORY : SUCCESS);
}

int cudaStreamDestroy(void *handle) {
    ENTER();
    Stream *stream = stream_of(handle);
    REQUIRE(stream, INVALID_HANDLE);
    drain(stream);
    stream->closing = 1;
    pthread_cond_broadcast(&changed);
    UNLINK(Stream, streams, stream);
    pthread_mutex_unlock(&lock);
    pthread_join(stream->thread, NULL);
    pthread_mutex_lock(&lock);
    free(stream);
    return leave(SUCCESS);
}

int cudaStreamSynchronize(void *handle) {
    ENTER();
    Stream *stream = stream_of(handle);
    REQUIRE(stream || !handle, INVALID_HANDLE);
    if (stream && stream->capture) {
        stream->invalidated = 1;
        return leave(CAPTURE_UNSUPPORTED);
    }
    if (stream) drain(stream);
    return leave(broken);
}

int cudaStreamWaitEvent(void *handle, void *event_handle, unsigned flags) {
    ENTER();
    Stream *stream = stream_of(handle);
    Event *event = FIND(Event, events, event_handle);
    REQUIRE((stream || !handle) && event && !flags, INVALID_HANDLE);
    int captures = stream && stream->capture;
    REQUIRE(captures == event->captured, CAPTURE_ISOLATION);
    if (event->asked && !captures) push(stream, (Op){.kind = WAIT, .event = event, .number = event->asked});
    return leave(SUCCESS);
}

int cudaEventCreateWithFlags(void **handle, unsigned flags) {
    ENTER();
    REQUIRE(flags <= 7, INVALID_VALUE);
    Event *event = calloc(1, sizeof *event);
    event->flags = flags;
    event->next = events;
    events = event;
    *handle = event;
    return leave(SUCCESS);
}

int cudaEventDestroy(void *handle) {
    ENTER();
    Event *event = FIND(Event, events, handle);
    REQUIRE(event, INVALID_HANDLE);
    while (event->done < event->asked) pthread_cond_wait(&changed, &lock);
    UNLINK(Event, events, event);
    free(event);
    return leave(SUCCESS);
}

int cudaEventRecord(void *handle, void *stream_handle) {
    ENTER();
    Event *event = FIND(Event, events, handle);
    Stream *stream = stream_of(stream_handle);
    REQUIRE(event && (stream || !stream_handle), INVALID_HANDLE);
    event->captured = stream && stream->capture;
    if (!event->captured) push(stream, (Op){.kind = RECORD, .event = event, .number = ++event->asked});
    return leave(SUCCESS);
}

int cudaEventSynchronize(void *handle) {
    ENTER();
    Event *event = FIND(Event, events, handle);
    REQUIRE(event, INVALID_HANDLE);
    REQUIRE(!event->captured, CAPTURED_EVENT);
    unsigned long number = event->asked;
    while (event->done < number) pthread_cond_wait(&changed, &lock);
    return leave(broken);
}

int cudaEventElapsedTime(float *ms, void *start_handle, void *end_handle) {
    ENTER();
    Event *start = FIND(Event, events, start_handle), *end = FIND(Event, events, end_handle);
    REQUIRE(start && end && start->asked && end->asked && !((start->flags | end->flags) & 2), INVALID_HANDLE);
    REQUIRE(!start->captured && !end->captured, CAPTURED_EVENT);
    REQUIRE(start->done == start->asked && end->done == end->asked, NOT_READY);
    *ms = (float)(end->at_ms - start->at_ms);
    return leave(SUCCESS);
}

/* Graphs */

int cudaStreamBeginCapture(void *handle, int mode) {
    ENTER();
    Stream *stream = stream_of(handle);
    REQUIRE(stream, CAPTURE_UNSUPPORTED);
    REQUIRE(!stream->capture && mode >= 0 && mode <= 2, INVALID_VALUE);
    Graph *graph = calloc(1, sizeof *graph);
    graph->last = &graph->first;
    stream->capture = graph;
    stream->capture_mode = mode;
    stream->captured_by = pthread_self();
    stream->invalidated = 0;
    return leave(SUCCESS);
}

int cudaStreamIsCapturing(void *handle, int *status) {
    ENTER();
    Stream *stream = stream_of(handle);
    REQUIRE(stream || !handle, INVALID_HANDLE);
    *status = !stream || !stream->capture ? 0 : stream->invalidated ? 2 : 1;
    return leave(SUCCESS);
}

static void free_ops(Graph *graph) {
    while (graph->first) {
        Op *op = graph->first;
        graph->first = op->next;
        free(op);
    }
    free(graph);
}

int cudaStreamEndCapture(void *handle, void **result) {
    ENTER();
    *result = NULL;
    Stream *stream = stream_of(handle);
    REQUIRE(stream && stream->capture, CAPTURE_UNMATCHED);
    REQUIRE(stream->capture_mode == 2 || pthread_equal(stream->captured_by, pthread_self()), CAPTURE_WRONG_THREAD);
    Graph *graph = stream->capture;
    stream->capture = NULL;
    if (stream->invalidated) {
        free_ops(graph);
        return leave(CAPTURE_INVALIDATED);
    }
    graph->next = graphs;
    graphs = graph;
    *result = graph;
    return leave(SUCCESS);
}

static int instantiate(void **result, void *handle) {
    Graph *graph = FIND(Graph, graphs, handle);
    REQUIRE(graph, INVALID_VALUE);
    Graph *executable = calloc(1, sizeof *executable);
    executable->last = &executable->first;
    for (Op *op = graph->first; op; op = op->next) {
        Op *copy = malloc(sizeof *copy);
        *copy = *op;
        copy->next = NULL;
        *executable->last = copy;
        executable->last = &copy->next;
    }
    executable->next = executables;
    executables = executable;
    *result = executable;
    return leave(SUCCESS);
}

#if CUDART_DOUBLE_VERSION >= 12000
int cudaGraphInstantiate(void **result, void *graph, unsigned long long flags) {
    (void)flags;
    ENTER();
    return instantiate(result, graph);
}
#else
int cudaGraphInstantiate(void **result, void *graph, void **error_node, char *log, size_t size) {
    (void)error_node, (void)log, (void)size;
    ENTER();
    return instantiate(result, graph);
}
#endif

#if CUDART_DOUBLE_VERSION >= 11040
int cudaGraphInstantiateWithFlags(void **result, void *graph, unsigned long long flags) {
    (void)flags;
    ENTER();
    return instantiate(result, graph);
}
#endif

int cudaGraphLaunch(void *handle, void *stream_handle) {
    ENTER();
    Graph *executable = FIND(Graph, executables, handle);
    Stream *stream = stream_of(stream_handle);
    REQUIRE(executable, INVALID_VALUE);
    REQUIRE(stream || !stream_handle, INVALID_HANDLE);
    for (Op *op = executable->first; op; op = op->next) push(stream, *op);
    return leave(SUCCESS);
}

int cudaGraphDestroy(void *handle) {
    ENTER();
    Graph *graph = FIND(Graph, graphs, handle);
    REQUIRE(graph, INVALID_VALUE);
    UNLINK(Graph, graphs, graph);
    free_ops(graph);
    return leave(SUCCESS);
}

int cudaGraphExecDestroy(void *handle) {
    ENTER();
    Graph *executable = FIND(Graph, executables, handle);
    REQUIRE(executable, INVALID_VALUE);
    drain_all(0);
    UNLINK(Graph, executables, executable);
    free_ops(executable);
    return leave(SUCCESS);
}

/* What only the double has, for the double of TensorRT and for tests */

int cudartDoubleVersion(void) { return CUDART_DOUBLE_VERSION; }

/* Puts a call on the stream, as a kernel launch would be; while the stream captures, it goes into the graph.
   A result other than 0 is an error that stays. The argument must live as long as the stream or the graph. */
int cudartDoubleEnqueue(void *handle, Work work, void *argument) {
    ENTER();
    Stream *stream = stream_of(handle);
    REQUIRE(stream || !handle, INVALID_HANDLE);
    push(stream, (Op){.kind = CALL, .work = work, .argument = argument});
    return leave(SUCCESS);
}

/* Where the bytes behind a pointer that a kernel may use are, or NULL when it may not use that many. */
void *cudartDoubleAlias(void *pointer, size_t bytes) {
    pthread_mutex_lock(&lock);
    Block *block = block_of(pointer, bytes);
    char *alias = block ? block->alias + ((char *)pointer - block->pointer) : NULL;
    pthread_mutex_unlock(&lock);
    return alias;
}

/* How much is allocated, and how many streams, events and graphs are open: 0 when all was given back. */
size_t cudartDoubleUsedBytes(void) { return used_bytes; }

int cudartDoubleOpenHandles(void) {
    int count = 0;
    pthread_mutex_lock(&lock);
    for (Stream *stream = streams; stream; stream = stream->next) count++;
    for (Event *event = events; event; event = event->next) count++;
    for (Graph *graph = graphs; graph; graph = graph->next) count++;
    for (Graph *graph = executables; graph; graph = graph->next) count++;
    pthread_mutex_unlock(&lock);
    return count;
}
