/* A GPU that computes nothing, so that the real program runs on a machine that has none.
 *
 * A library in front of CUDA's (LD_PRELOAD; its soname is libcuda.so.1): runtime and driver, cuBLAS, cuBLASLt, cuDNN,
 * cuSOLVER and NCCL as far as torch and Triton call them. Device memory is an address range, kernels are recorded and
 * not executed, and streams, events and graph captures keep the rules that break real programs. Values are meaningless:
 * device memory reads as zeros except for what small copies and fills put there. What a program asks of all values
 * comes out well: all() is true, any() false, nonzero() finds none.
 *
 *   STANDIN_CARD=h100|h200|b200|a100   what the devices say they are (default h200)
 *   STANDIN_MEMORY=BYTES               memory of each device (default: the card's)
 *   STANDIN_DEVICES=N                  how many there are (default 1)
 *   STANDIN_COPY=BYTES                 copies and fills up to this size move bytes (default 1 MiB); larger ones with
 *                                      device memory are recorded only, and what they would have written to the host
 *                                      reads as zeros, so that large models need little host memory
 *   STANDIN_LOG=FILE                   a line an event, fields separated by tabs, each line begun with process, thread
 *                                      and device:
 *     launch number kind name grid block shared stream graph ms bytes flops label
 *                                      kind: kernel|triton|gemm|cudnn|solver|copy|memset|nccl|graph|host; graph: number
 * of the capture it is recorded into, or 0; ms: assumed; label: of standin_begin, or - work number ms bytes flops
 * figures of an earlier launch, and the time they add to it malloc bytes total | free bytes total | oom bytes total
 *     sync call                        the host waited for the device
 *     graph begin|end|free number [nodes ms]
 *     profiler start|stop
 *     mark text                        of standin_mark
 *     violation text                   what a GPU would have refused, or computed wrongly
 *
 * Exported besides CUDA's functions: standin_begin(label) and standin_end(bytes, flops), between which a program says
 * what the launches of a thread belong to and what they move and do; standin_mark(text), a line of its own in the log;
 * and standin_violations, how many so far. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
/* cuBLAS includes the headers of half precision for a name each; they need CUDA's C++ library, which is in no wheel. */
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
typedef struct {
  unsigned short bits;
} __half, __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn.h>
#include <cusolverDn.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <nccl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#if CUDART_VERSION < 13000
#error "the stand-in is written for CUDA 13"
#endif

#define API __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* One lock guards everything below. It is recursive, so that a check may call another. */
static pthread_mutex_t lock_ = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static void unlock(int *unused) { pthread_mutex_unlock(&lock_); }
/* Holds the lock until the end of the enclosing block. */
#define LOCKED                                            \
  __attribute__((cleanup(unlock), unused)) int held_ = 0; \
  pthread_mutex_lock(&lock_)

/* ==================================================================================================================
 * The log */

static _Thread_local int device; /* current one of this thread */
static long violations;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...) {
  static int file = -2;
  static pid_t owner;
  if (file == -2 || owner != getpid()) { /* opened anew after a fork: appended lines must stay whole */
    const char *path = getenv("STANDIN_LOG");
    file = path && *path ? open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666) : -1;
    owner = getpid();
  }
  if (file < 0) return;
  char line[2048];
  int n = snprintf(line, sizeof line, "%d\t%ld\t%d\t", (int)owner, (long)syscall(SYS_gettid), device);
  va_list arguments;
  va_start(arguments, format);
  n += vsnprintf(line + n, sizeof line - (size_t)n, format, arguments);
  va_end(arguments);
  n = MIN(n, (int)sizeof line - 2);
  line[n++] = '\n';
  if (write(file, line, (size_t)n) != n) file = -1;
}

/* A line for whoever reads the log: what follows belongs to `text`. */
API void standin_mark(const char *text) { say("mark\t%s", text); }

static void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void complain(const char *format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fprintf(stderr, "[standin] %s\n", text);
  say("violation\t%s", text);
  __atomic_add_fetch(&violations, 1, __ATOMIC_RELAXED);
}

API long standin_violations(void) { return __atomic_load_n(&violations, __ATOMIC_RELAXED); }

/* Errors of the runtime stay readable until cudaGetLastError, as CUDA's. */
static _Thread_local cudaError_t last_error;
static cudaError_t fail(cudaError_t error) {
  if (error != cudaErrorNotReady) last_error = error;
  return error;
}

/* ==================================================================================================================
 * Cards. Memory as torch's out-of-memory messages print it (GiB), the rest from vendors' tables; the rates are dense
 * datasheet peaks and serve assumed times only. */

typedef struct {
  const char *key, *name;
  int major, minor, processors;
  size_t memory_mib;
  int shared_optin, shared_processor, l2_mib, clock_khz, memory_clock_khz, bus_bits;
  double bf16, fp8, fp32, fp64; /* TFLOP/s */
  double bandwidth;             /* bytes a ms */
} Card;

static const Card cards[] = {
    {"h200", "NVIDIA H200", 9, 0, 132, 143156, 232448, 233472, 60, 1980000, 3201000, 6144, 989, 1979, 67, 67, 4.8e9},
    {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 81080, 232448, 233472, 50, 1980000, 2619000, 5120, 989, 1979, 67, 67,
     3.35e9},
    {"b200", "NVIDIA B200", 10, 0, 148, 182632, 232448, 233472, 126, 1965000, 3996000, 8192, 2250, 4500, 80, 40, 8e9},
    {"a100", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 81050, 166912, 167936, 40, 1410000, 1593000, 5120, 312, 312, 19.5,
     19.5, 2.04e9},
};

static const Card *card(void) {
  static const Card *found;
  if (found) return found;
  const char *key = getenv("STANDIN_CARD");
  for (size_t i = 0; i < sizeof cards / sizeof *cards; i++)
    if (!key || !*key || !strcmp(key, cards[i].key)) return found = &cards[i];
  fprintf(stderr, "[standin] STANDIN_CARD is %s, expected h100, h200, b200 or a100\n", key);
  exit(2);
}

static long setting(const char *name, long otherwise) {
  const char *value = getenv(name);
  return value && *value ? strtol(value, NULL, 10) : otherwise;
}
#define MAX_DEVICES 64
static int device_count(void) {
  static int n;
  if (!n) n = (int)MIN(setting("STANDIN_DEVICES", 1), MAX_DEVICES);
  return n;
}
static size_t memory_size(void) {
  static size_t n;
  if (!n) n = (size_t)setting("STANDIN_MEMORY", (long)(card()->memory_mib << 20));
  return n;
}
static size_t copy_limit(void) {
  static size_t n = (size_t)-1;
  if (n == (size_t)-1) n = (size_t)setting("STANDIN_COPY", 1 << 20);
  return n;
}
/* What a context and its modules take before the first allocation. */
static size_t context_size(void) { return MIN((size_t)512 << 20, memory_size() / 16); }

/* ==================================================================================================================
 * Memory. Device addresses lie in a range without access rights: a host that follows a device pointer faults, as it
 * does with a GPU. What copies and fills leave there is kept at the same offset of a second range. Addresses of freed
 * memory are not given out again, so that a kernel that still points there is seen. */

enum { DEVICE_MEMORY, HOST_MEMORY, REGISTERED_MEMORY };
typedef struct {
  uintptr_t at;
  size_t size;
  int kind, device;
  unsigned long serial;
} Block;

#define SPACE ((size_t)1 << 45) /* 32 TiB of addresses */
static uintptr_t space, shadow, space_end;
static Block *blocks; /* sorted by address */
static size_t block_count, block_room;
static size_t used[MAX_DEVICES];
static unsigned long serials;

static void open_space(void) {
  if (space) return;
  void *a = mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  void *b = mmap(NULL, SPACE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (a == MAP_FAILED || b == MAP_FAILED) {
    fprintf(stderr, "[standin] cannot reserve %zu bytes of addresses\n", SPACE);
    exit(2);
  }
  space = space_end = (uintptr_t)a;
  shadow = (uintptr_t)b;
}
static int in_space(uintptr_t p) { return space && p >= space && p < space + SPACE; }
static void *shadow_of(const void *p) { return in_space((uintptr_t)p) ? (char *)p - space + shadow : (void *)p; }

/* Index of the first block that begins after p. */
static size_t block_after(uintptr_t p) {
  size_t low = 0, high = block_count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (blocks[middle].at <= p)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}
static Block *block_of(const void *p) {
  size_t i = block_after((uintptr_t)p);
  return i && (uintptr_t)p < blocks[i - 1].at + blocks[i - 1].size ? &blocks[i - 1] : NULL;
}
static void add_block(uintptr_t at, size_t size, int kind) {
  if (block_count == block_room)
    blocks = realloc(blocks, (block_room = block_room ? 2 * block_room : 1024) * sizeof *blocks);
  size_t i = block_after(at);
  memmove(blocks + i + 1, blocks + i, (block_count - i) * sizeof *blocks);
  blocks[i] = (Block){at, size, kind, device, ++serials};
  block_count++;
}
static void drop_block(Block *b) { memmove(b, b + 1, (size_t)(blocks + --block_count - b) * sizeof *b); }

static uintptr_t take_addresses(size_t size, size_t alignment) {
  open_space();
  uintptr_t at = (space_end + alignment - 1) & ~(uintptr_t)(alignment - 1);
  if (at + size > space + SPACE) {
    fprintf(stderr, "[standin] out of device addresses: %zu bytes were given out\n", SPACE);
    exit(2);
  }
  space_end = at + size + 4096; /* a gap, so that a pointer past the end is in no block */
  return at;
}
static int charge(size_t size) {
  if (used[device] + size + context_size() > memory_size()) {
    say("oom\t%zu\t%zu", size, used[device]);
    return 0;
  }
  used[device] += size;
  say("malloc\t%zu\t%zu", size, used[device]);
  return 1;
}
static void discharge(size_t size, int of) {
  used[of] -= size;
  say("free\t%zu\t%zu", size, used[of]);
}
static void *allocate(size_t size) {
  size = (MAX(size, 1) + 511) & ~(size_t)511;
  if (!charge(size)) return NULL;
  uintptr_t at = take_addresses(size, size >= 2 << 20 ? 2 << 20 : 512);
  add_block(at, size, DEVICE_MEMORY);
  return (void *)at;
}
static void forget_bytes(uintptr_t at, size_t size) { madvise(shadow_of((void *)at), size, MADV_DONTNEED); }
static int release(void *p) {
  Block *b = block_of(p);
  if (!b || b->at != (uintptr_t)p || b->kind != DEVICE_MEMORY) return 0;
  discharge(b->size, b->device);
  forget_bytes(b->at, b->size);
  drop_block(b);
  return 1;
}
static void *allocate_host(size_t size) {
  void *p = mmap(NULL, MAX(size, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return NULL;
  add_block((uintptr_t)p, MAX(size, 1), HOST_MEMORY);
  return p;
}
static int on_device(const void *p) {
  Block *b = block_of(p);
  return b && b->kind == DEVICE_MEMORY;
}

/* ==================================================================================================================
 * Streams, events, captures.
 *
 * Each stream of a capture has a slot. `seen[slot]` is how much of that slot's work this stream waits for, directly or
 * through others: a capture is joined when its first stream has seen the last node of every slot. */

#define SLOTS 64
struct Stream;
typedef struct {
  unsigned long id;
  int mode, alive, broken;
  pthread_t thread;
  struct Stream *origin;
  int slots;
  long last[SLOTS];
  long nodes;
  double ms;
  struct {
    uintptr_t at;
    unsigned long serial;
  } *uses; /* allocations that its nodes point into */
  size_t use_count, use_room;
} Capture;
typedef struct Stream {
  int id, priority, slot, device;
  unsigned flags;
  Capture *capture;
  long seen[SLOTS];
  double clock; /* ms */
  struct Stream *next;
} Stream;
typedef struct {
  Capture *capture;
  long seen[SLOTS];
  double at;
  int recorded;
  unsigned flags;
} Event;
typedef struct {
  Capture *capture; /* ended */
} Graph;

static Stream legacy, per_thread = {.id = -1};
static Stream *streams;
static Capture *captures[64]; /* in progress */
static int capture_count;
static unsigned long capture_ids;
static int stream_ids;
static _Thread_local int thread_mode = cudaStreamCaptureModeGlobal;

static Stream *stream_of(cudaStream_t s) {
  if (s == NULL || s == cudaStreamLegacy) return &legacy;
  return s == cudaStreamPerThread ? &per_thread : (Stream *)s;
}
static Capture *capture_of_thread(void) {
  for (int i = 0; i < capture_count; i++)
    if (pthread_equal(captures[i]->thread, pthread_self())) return captures[i];
  return NULL;
}

/* For calls that CUDA forbids while a capture is in progress: allocation, synchronisation, queries. */
static cudaError_t forbidden(const char *call) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (int i = 0; i < capture_count; i++) {
    Capture *c = captures[i];
    int own = pthread_equal(c->thread, pthread_self());
    int everywhere = c->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (c->mode == cudaStreamCaptureModeRelaxed || !(own || everywhere)) continue;
    complain("%s during a capture%s", call, own ? "" : " of another thread");
    c->broken = 1;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

/* A node of the capture points into this memory. */
static void note_use(Stream *s, const void *p) {
  Capture *c = s->capture;
  Block *b = c ? block_of(p) : NULL;
  if (!b || b->kind != DEVICE_MEMORY) return;
  for (size_t i = c->use_count; i-- > 0;)
    if (c->uses[i].serial == b->serial) return;
  if (c->use_count == c->use_room)
    c->uses = realloc(c->uses, (c->use_room = c->use_room ? 2 * c->use_room : 64) * sizeof *c->uses);
  c->uses[c->use_count].at = b->at;
  c->uses[c->use_count++].serial = b->serial;
}

/* ==================================================================================================================
 * Launches */

typedef struct {
  const char *kind, *name;
  dim3 grid, block;
  size_t shared;
  double ms, bytes, flops;
} Work;
#define ONE ((dim3){1, 1, 1})

/* What a program says of its launches. A frame names those of its thread until it ends, which is when their bytes and
 * operations are known; they go to the first launch whose work is not known here. Frames nest: where an inner one had
 * launches of its own, the outer's figures would count them twice and are dropped. */
#define FRAMES 64
typedef struct {
  char label[160];
  unsigned long first; /* number of the launch that gets the figures, 0 while there is none */
  Stream *stream;
  Capture *capture;
  int inner;
} Frame;
static _Thread_local Frame frames[FRAMES];
static _Thread_local int depth;
static unsigned long launch_numbers;

API void standin_begin(const char *label) {
  if (depth++ >= FRAMES) return;
  Frame *f = &frames[depth - 1];
  *f = (Frame){.first = 0};
  snprintf(f->label, sizeof f->label, "%s", label);
}
static double time_of(double bytes, double flops) {
  return 2e-3 + MAX(bytes / (0.85 * card()->bandwidth), flops / (0.65e9 * card()->bf16));
}
API void standin_end(double bytes, double flops) {
  LOCKED;
  if (depth <= 0 || depth-- > FRAMES) return;
  Frame *f = &frames[depth];
  if (depth && (f->first || f->inner)) frames[depth - 1].inner = 1;
  if (!f->first || f->inner || !(bytes || flops)) return;
  double ms = time_of(bytes, flops) - time_of(0, 0);
  if (f->capture)
    f->capture->ms += ms;
  else if (f->stream)
    f->stream->clock += ms;
  say("work\t%lu\t%.6f\t%.0f\t%.0f", f->first, ms, bytes, flops);
}

static cudaError_t submit(Work w, Stream *s) {
  LOCKED;
  Capture *own = capture_of_thread();
  if (s == &legacy && own && !(own->origin->flags & cudaStreamNonBlocking)) {
    complain("%s %s on the legacy stream while a blocking stream captures", w.kind, w.name);
    own->broken = 1;
    return fail(cudaErrorStreamCaptureImplicit);
  }
  if (own && !s->capture) complain("%s %s on stream %d, outside the capture of its thread", w.kind, w.name, s->id);
  Frame *f = depth > 0 && depth <= FRAMES ? &frames[depth - 1] : NULL;
  launch_numbers++;
  if (f && !f->first && !w.bytes && !w.flops) f->first = launch_numbers, f->stream = s, f->capture = s->capture;
  if (!w.ms) w.ms = time_of(w.bytes, w.flops);
  if (s->capture) {
    Capture *c = s->capture;
    s->seen[s->slot] = ++c->last[s->slot];
    c->nodes++;
    c->ms += w.ms;
  } else
    s->clock += w.ms;
  say("launch\t%lu\t%s\t%s\t%u,%u,%u\t%u,%u,%u\t%zu\t%d\t%lu\t%.6f\t%.0f\t%.0f\t%s", launch_numbers, w.kind, w.name,
      w.grid.x, w.grid.y, w.grid.z, w.block.x, w.block.y, w.block.z, w.shared, s->id, s->capture ? s->capture->id : 0,
      w.ms, w.bytes, w.flops, f ? f->label : "-");
  return cudaSuccess;
}

/* What no GPU takes: returns an error and says why. */
static cudaError_t check_configuration(const char *name, dim3 g, dim3 b, size_t shared, int asked) {
  const char *wrong = !g.x || !g.y || !g.z                              ? "an empty grid"
                      : g.x > 2147483647u || g.y > 65535 || g.z > 65535 ? "a grid that is too large"
                      : !b.x || !b.y || !b.z                            ? "an empty block"
                      : (size_t)b.x * b.y * b.z > 1024 || b.z > 64      ? "a block that is too large"
                      : shared > (size_t)card()->shared_optin           ? "more shared memory than a block may have"
                      : shared > 49152 && shared > (size_t)asked ? "more than 48 KiB of shared memory, not asked for"
                                                                 : NULL;
  if (!wrong) return cudaSuccess;
  complain("kernel %s has %s: grid %u,%u,%u block %u,%u,%u shared %zu", name, wrong, g.x, g.y, g.z, b.x, b.y, b.z,
           shared);
  return fail(cudaErrorInvalidConfiguration);
}

/* ==================================================================================================================
 * Runtime: devices and errors */

API cudaError_t cudaGetDeviceCount(int *n) { return *n = device_count(), cudaSuccess; }
API cudaError_t cudaGetDevice(int *d) { return *d = device, cudaSuccess; }
API cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= device_count()) return fail(cudaErrorInvalidDevice);
  device = d;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *v) { return *v = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceReset(void) { return cudaSuccess; }
API cudaError_t cudaSetDeviceFlags(unsigned f) { return cudaSuccess; }
API cudaError_t cudaInitDevice(int d, unsigned f, unsigned g) { return cudaSetDevice(d); }

static int attribute(int which) {
  const Card *c = card();
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return c->shared_optin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return c->shared_processor;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return c->processors;
    case cudaDevAttrComputeCapabilityMajor: return c->major;
    case cudaDevAttrComputeCapabilityMinor: return c->minor;
    case cudaDevAttrL2CacheSize: return c->l2_mib << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrClockRate: return c->clock_khz;
    case cudaDevAttrMemoryClockRate: return c->memory_clock_khz;
    case cudaDevAttrGlobalMemoryBusWidth: return c->bus_bits;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrPciBusId: return 1;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrComputePreemptionSupported:
    case cudaDevAttrCanMapHostMemory:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1;
    default: return 0;
  }
}
API cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) { return *v = attribute(a), cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
  if (d < 0 || d >= device_count()) return fail(cudaErrorInvalidDevice);
  const Card *c = card();
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", c->name);
  memset(p->uuid.bytes, d + 1, sizeof p->uuid.bytes);
  p->totalGlobalMem = memory_size();
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = (size_t)c->shared_optin;
  p->sharedMemPerMultiprocessor = (size_t)c->shared_processor;
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->totalConstMem = 65536;
  p->major = c->major;
  p->minor = c->minor;
  p->multiProcessorCount = c->processors;
  p->l2CacheSize = c->l2_mib << 20;
  p->memoryBusWidth = c->bus_bits;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->asyncEngineCount = 3;
  p->pciBusID = d + 1;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = p->memoryPoolsSupported = p->hostRegisterSupported = p->computePreemptionSupported = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) {
  return snprintf(s, (size_t)n, "0000:%02x:00.0", d + 1), cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) {
  if (low) *low = 0;
  if (high) *high = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceEnablePeerAccess(int d, unsigned f) { return cudaSuccess; }
API cudaError_t cudaDeviceGetLimit(size_t *n, enum cudaLimit l) { return *n = 8 << 20, cudaSuccess; }
API cudaError_t cudaDeviceSetLimit(enum cudaLimit l, size_t n) { return cudaSuccess; }

static cudaError_t wait(const char *call) {
  LOCKED;
  cudaError_t error = forbidden(call);
  if (!error) say("sync\t%s", call);
  return error;
}
API cudaError_t cudaDeviceSynchronize(void) { return wait("cudaDeviceSynchronize"); }

API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
API cudaError_t cudaPeekAtLastError(void) { return last_error; }
static const struct {
  cudaError_t error;
  const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined",
     "capture sequence contains a fork that was not joined to the primary stream"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
};
static const char *error_text(cudaError_t error, int name) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].error == error) return name ? errors[i].name : errors[i].text;
  return "unknown error";
}
API const char *cudaGetErrorName(cudaError_t e) { return error_text(e, 1); }
API const char *cudaGetErrorString(cudaError_t e) { return error_text(e, 0); }
API cudaError_t cudaProfilerStart(void) { return say("profiler\tstart"), cudaSuccess; }
API cudaError_t cudaProfilerStop(void) { return say("profiler\tstop"), cudaSuccess; }

/* ==================================================================================================================
 * Runtime: memory */

API cudaError_t cudaMalloc(void **p, size_t n) {
  LOCKED;
  cudaError_t error = forbidden("cudaMalloc");
  if (error) return error;
  *p = allocate(n);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFree(void *p) {
  LOCKED;
  cudaError_t error = forbidden("cudaFree");
  if (error || !p) return error;
  return release(p) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
API cudaError_t cudaMallocManaged(void **p, size_t n, unsigned f) { return cudaMalloc(p, n); }
API cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  LOCKED;
  *total = memory_size();
  *available = memory_size() - context_size() - used[device];
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) {
  LOCKED;
  cudaError_t error = forbidden("cudaHostAlloc");
  if (error) return error;
  return (*p = allocate_host(n)) ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }
API cudaError_t cudaFreeHost(void *p) {
  LOCKED;
  if (!p) return cudaSuccess;
  Block *b = block_of(p);
  if (!b || b->at != (uintptr_t)p || b->kind != HOST_MEMORY) return fail(cudaErrorInvalidValue);
  munmap(p, b->size);
  drop_block(b);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void *p, size_t n, unsigned f) {
  LOCKED;
  cudaError_t error = forbidden("cudaHostRegister");
  if (error) return error;
  if (block_of(p)) return fail(cudaErrorHostMemoryAlreadyRegistered);
  add_block((uintptr_t)p, n, REGISTERED_MEMORY);
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void *p) {
  LOCKED;
  Block *b = block_of(p);
  if (!b || b->kind != REGISTERED_MEMORY) return fail(cudaErrorHostMemoryNotRegistered);
  drop_block(b);
  return cudaSuccess;
}
API cudaError_t cudaHostGetDevicePointer(void **d, void *p, unsigned f) { return *d = p, cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  LOCKED;
  memset(a, 0, sizeof *a);
  Block *b = block_of(p);
  a->type = !b ? cudaMemoryTypeUnregistered : b->kind == DEVICE_MEMORY ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  a->device = b ? b->device : -2;
  if (b) a->devicePointer = (void *)p;
  if (b && b->kind != DEVICE_MEMORY) a->hostPointer = (void *)p;
  return cudaSuccess;
}

/* Pools: every allocation of a pool is one of the device. Unlike cudaMalloc they are permitted in a capture. */
API cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) {
  LOCKED;
  *p = allocate(n);
  if (*p) note_use(stream_of(s), *p);
  return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t cudaMallocFromPoolAsync(void **p, size_t n, cudaMemPool_t m, cudaStream_t s) {
  return cudaMallocAsync(p, n, s);
}
API cudaError_t cudaFreeAsync(void *p, cudaStream_t s) {
  LOCKED;
  return !p || release(p) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int d) {
  return *p = (cudaMemPool_t)(uintptr_t)(d + 1), cudaSuccess;
}
API cudaError_t cudaDeviceGetMemPool(cudaMemPool_t *p, int d) { return cudaDeviceGetDefaultMemPool(p, d); }
API cudaError_t cudaDeviceSetMemPool(int d, cudaMemPool_t p) { return cudaSuccess; }
API cudaError_t cudaMemPoolCreate(cudaMemPool_t *p, const struct cudaMemPoolProps *q) {
  return cudaDeviceGetDefaultMemPool(p, device);
}
API cudaError_t cudaMemPoolDestroy(cudaMemPool_t p) { return cudaSuccess; }
API cudaError_t cudaMemPoolTrimTo(cudaMemPool_t p, size_t n) { return cudaSuccess; }
API cudaError_t cudaMemPoolSetAccess(cudaMemPool_t p, const struct cudaMemAccessDesc *d, size_t n) {
  return cudaSuccess;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) { return cudaSuccess; }
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) {
  LOCKED;
  *(uint64_t *)v = used[((uintptr_t)p - 1) % MAX_DEVICES];
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetGraphMemAttribute(int d, enum cudaGraphMemAttributeType a, void *v) {
  return *(uint64_t *)v = 0, cudaSuccess;
}
API cudaError_t cudaDeviceSetGraphMemAttribute(int d, enum cudaGraphMemAttributeType a, void *v) { return cudaSuccess; }

/* Copies. `rows` of `width` bytes, pitches apart. */
typedef struct {
  void *to;
  const void *from;
  size_t to_pitch, from_pitch, width, rows;
} Copy;

/* Whether all of it is allocated; it may span neighbouring blocks. */
static int allocated(uintptr_t p, size_t n) {
  for (uintptr_t at = p; at < p + n;) {
    Block *b = block_of((void *)at);
    if (!b) return 0;
    at = b->at + b->size;
  }
  return 1;
}
static void check_end(const char *what, const void *p, size_t pitch, const Copy *c) {
  size_t n = pitch * (c->rows - 1) + c->width;
  if (in_space((uintptr_t)p) && !block_of(p))
    complain("a copy %s memory that is not allocated", what);
  else if (block_of(p) && !allocated((uintptr_t)p, n))
    complain("a copy %s past its allocation", what);
}
/* Host memory that a large copy would have filled reads as zeros: whole pages are dropped, so that they take no memory.
 */
static void forget_host(void *p, size_t size) {
  uintptr_t begin = (uintptr_t)p, end = begin + size, first = (begin + 4095) & ~(uintptr_t)4095,
            last = end & ~(uintptr_t)4095;
  memset(p, 0, first - begin);
  madvise((void *)first, last - first, MADV_DONTNEED);
  memset((void *)last, 0, end - last);
}
static cudaError_t copy(Copy c, Stream *s, const char *call) {
  LOCKED;
  int to_device = in_space((uintptr_t)c.to), from_device = in_space((uintptr_t)c.from);
  size_t size = c.width * c.rows;
  if (!size) return cudaSuccess;
  check_end("writes", c.to, c.to_pitch, &c);
  check_end("reads", c.from, c.from_pitch, &c);
  int pageable = (!to_device && !block_of(c.to)) || (!from_device && !block_of(c.from));
  if (call) {
    cudaError_t error = forbidden(call);
    if (error) return error;
  }
  if (s->capture && pageable) {
    complain("a copy of %zu bytes with pageable host memory was captured", size);
    s->capture->broken = 1;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  char name[64];
  snprintf(name, sizeof name, "%s->%s%s", from_device ? "device" : "host", to_device ? "device" : "host",
           pageable ? " pageable" : "");
  int both = to_device && from_device;
  double ms = 1e-3 + (both ? 2.0 * (double)size / (0.85 * card()->bandwidth) : (double)size / 5e7);
  note_use(s, c.to);
  note_use(s, c.from);
  cudaError_t error = submit((Work){"copy", name, ONE, ONE, 0, ms, (both ? 2.0 : 1.0) * (double)size, 0}, s);
  if (error) return error;
  if (!s->capture && (call || (pageable && !both)))
    say("sync\t%s %zu bytes %s", call ? call : "cudaMemcpyAsync", size, name);
  if (s->capture) return cudaSuccess;
  if (size > copy_limit() && (to_device || from_device)) {
    if (!to_device && c.rows == 1) forget_host(c.to, size);
    return cudaSuccess;
  }
  for (size_t r = 0; r < c.rows; r++)
    memmove((char *)shadow_of(c.to) + r * c.to_pitch, (char *)shadow_of(c.from) + r * c.from_pitch, c.width);
  return cudaSuccess;
}
#define LINE(d, s, n) ((Copy){d, s, n, n, n, 1})
API cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
  return copy(LINE(d, s, n), &legacy, "cudaMemcpy");
}
API cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  return copy(LINE(d, s, n), stream_of(t), NULL);
}
API cudaError_t cudaMemcpyPeerAsync(void *d, int to, const void *s, int from, size_t n, cudaStream_t t) {
  return copy(LINE(d, s, n), stream_of(t), NULL);
}
API cudaError_t cudaMemcpy2DAsync(void *d, size_t dp, const void *s, size_t sp, size_t w, size_t h,
                                  enum cudaMemcpyKind k, cudaStream_t t) {
  return copy((Copy){d, s, dp, sp, w, h}, stream_of(t), NULL);
}

static cudaError_t fill(void *d, int v, size_t n, Stream *s, const char *call) {
  LOCKED;
  if (call) {
    cudaError_t error = forbidden(call);
    if (error) return error;
  }
  if (!n) return cudaSuccess;
  Copy c = LINE(d, d, n);
  check_end("fills", d, n, &c);
  note_use(s, d);
  if (!s->capture && n <= copy_limit()) memset(shadow_of(d), v, n);
  return submit((Work){"memset", "memset", ONE, ONE, 0, 0, (double)n, 0}, s);
}
API cudaError_t cudaMemset(void *d, int v, size_t n) { return fill(d, v, n, &legacy, "cudaMemset"); }
API cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t s) { return fill(d, v, n, stream_of(s), NULL); }

/* ==================================================================================================================
 * Runtime: streams and events */

static cudaError_t make_stream(cudaStream_t *out, unsigned flags, int priority) {
  LOCKED;
  Stream *s = calloc(1, sizeof *s);
  s->flags = flags;
  s->priority = priority;
  s->device = device;
  s->id = ++stream_ids;
  s->next = streams;
  streams = s;
  *out = (cudaStream_t)s;
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t *s) { return make_stream(s, 0, 0); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) { return make_stream(s, f, 0); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return make_stream(s, f, p); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  LOCKED;
  Stream *s = stream_of(stream);
  if (s->capture) complain("stream %d is destroyed while it captures", s->id);
  for (Stream **link = &streams; *link; link = &(*link)->next)
    if (*link == s) {
      *link = s->next;
      free(s);
      break;
    }
  return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) { return *p = stream_of(s)->priority, cudaSuccess; }
API cudaError_t cudaStreamGetFlags(cudaStream_t s, unsigned *f) { return *f = stream_of(s)->flags, cudaSuccess; }
API cudaError_t cudaStreamGetDevice(cudaStream_t s, int *d) { return *d = stream_of(s)->device, cudaSuccess; }
API cudaError_t cudaStreamGetId(cudaStream_t s, unsigned long long *id) {
  return *id = (unsigned long long)stream_of(s)->id, cudaSuccess;
}

static cudaError_t refuse_in_capture(Stream *s, const char *call) {
  complain("%s of a stream that captures", call);
  s->capture->broken = 1;
  return fail(cudaErrorStreamCaptureUnsupported);
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  LOCKED;
  Stream *s = stream_of(stream);
  return s->capture ? refuse_in_capture(s, "cudaStreamSynchronize") : wait("cudaStreamSynchronize");
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  LOCKED;
  Stream *s = stream_of(stream);
  return s->capture ? refuse_in_capture(s, "cudaStreamQuery") : forbidden("cudaStreamQuery");
}
/* Work is over as soon as it is submitted, so functions for its end are called at once; captured ones are not. */
API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags) {
  if (stream_of(s)->capture) return refuse_in_capture(stream_of(s), "cudaStreamAddCallback");
  f(s, cudaSuccess, data);
  return cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
  if (stream_of(s)->capture) return submit((Work){"host", "function", ONE, ONE, 0, 1e-3, 0, 0}, stream_of(s));
  f(data);
  return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags) {
  Event *e = calloc(1, sizeof *e);
  e->flags = flags;
  *out = (cudaEvent_t)e;
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  LOCKED;
  Event *e = (Event *)event;
  Stream *s = stream_of(stream);
  e->recorded = 1;
  e->capture = s->capture;
  e->at = s->clock;
  memcpy(e->seen, s->seen, sizeof e->seen);
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
static cudaError_t refuse_captured_event(Event *e, const char *call) {
  if (!e->capture || !e->capture->alive) return cudaSuccess;
  complain("%s of an event that was recorded in a capture", call);
  return fail(cudaErrorCapturedEvent);
}
API cudaError_t cudaEventQuery(cudaEvent_t e) {
  LOCKED;
  cudaError_t error = refuse_captured_event((Event *)e, "cudaEventQuery");
  return error ? error : forbidden("cudaEventQuery");
}
API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  LOCKED;
  cudaError_t error = refuse_captured_event((Event *)e, "cudaEventSynchronize");
  return error ? error : wait("cudaEventSynchronize");
}
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  LOCKED;
  Event *x = (Event *)a, *y = (Event *)b;
  if ((x->flags | y->flags) & cudaEventDisableTiming || !x->recorded || !y->recorded)
    return fail(cudaErrorInvalidResourceHandle);
  *ms = (float)MAX(y->at - x->at, 1e-3); /* a program may divide by it */
  return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  LOCKED;
  Stream *s = stream_of(stream);
  Event *e = (Event *)event;
  if (!e->recorded) return cudaSuccess;
  if (!e->capture || !e->capture->alive) {
    if (s->capture && s->capture != e->capture) {
      complain("stream %d waits, in a capture, for an event recorded outside of it", s->id);
      s->capture->broken = 1;
      return fail(cudaErrorStreamCaptureIsolation);
    }
    s->clock = MAX(s->clock, e->at);
    return cudaSuccess;
  }
  if (s == &legacy) {
    complain("the legacy stream waits for a capture");
    e->capture->broken = 1;
    return fail(cudaErrorStreamCaptureImplicit);
  }
  if (s->capture && s->capture != e->capture) {
    complain("stream %d waits for an event of another capture", s->id);
    return fail(cudaErrorStreamCaptureMerge);
  }
  if (!s->capture) { /* the stream joins the capture */
    if (e->capture->slots == SLOTS) {
      complain("a capture has more than %d streams", SLOTS);
      return fail(cudaErrorNotSupported);
    }
    s->capture = e->capture;
    s->slot = e->capture->slots++;
    memset(s->seen, 0, sizeof s->seen);
  }
  for (int i = 0; i < SLOTS; i++) s->seen[i] = MAX(s->seen[i], e->seen[i]);
  return cudaSuccess;
}

/* ==================================================================================================================
 * Runtime: graphs */

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  LOCKED;
  Stream *s = stream_of(stream);
  if (s == &legacy || s->capture || capture_count == 64) return fail(cudaErrorStreamCaptureUnsupported);
  Capture *c = calloc(1, sizeof *c);
  *c = (Capture){.id = ++capture_ids, .mode = mode, .alive = 1, .thread = pthread_self(), .origin = s, .slots = 1};
  s->capture = c;
  s->slot = 0;
  memset(s->seen, 0, sizeof s->seen);
  captures[capture_count++] = c;
  say("graph\tbegin\t%lu", c->id);
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
  LOCKED;
  Stream *s = stream_of(stream);
  Capture *c = s->capture;
  *out = NULL;
  if (!c || s != c->origin) return fail(c ? cudaErrorStreamCaptureUnmatched : cudaErrorIllegalState);
  if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self()))
    return fail(cudaErrorStreamCaptureWrongThread);
  int unjoined = 0;
  for (int i = 0; i < c->slots; i++) unjoined |= s->seen[i] < c->last[i];
  for (Stream *t = streams; t; t = t->next)
    if (t->capture == c) t->capture = NULL;
  c->alive = 0;
  for (int i = 0; i < capture_count; i++)
    if (captures[i] == c) {
      captures[i] = captures[--capture_count];
      break;
    }
  say("graph\tend\t%lu\t%ld\t%.3f", c->id, c->nodes, c->ms);
  if (unjoined) complain("a capture ends with a stream that was not joined");
  if (c->broken) return fail(cudaErrorStreamCaptureInvalidated);
  if (unjoined) return fail(cudaErrorStreamCaptureUnjoined);
  Graph *g = calloc(1, sizeof *g);
  g->capture = c;
  *out = (cudaGraph_t)g;
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  LOCKED;
  Capture *c = stream_of(s)->capture;
  *status = !c          ? cudaStreamCaptureStatusNone
            : c->broken ? cudaStreamCaptureStatusInvalidated
                        : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                         cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *n) {
  LOCKED;
  Capture *c = stream_of(s)->capture;
  if (status) cudaStreamIsCapturing(s, status);
  if (id) *id = c ? c->id : 0;
  if (graph) *graph = (cudaGraph_t)c;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  int before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  return cudaSuccess;
}
API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t s, cudaGraphNode_t *d, const cudaGraphEdgeData *e,
                                                    size_t n, unsigned f) {
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long f) {
  Graph *copied = calloc(1, sizeof *copied);
  *copied = *(Graph *)g;
  *x = (cudaGraphExec_t)copied;
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long f) {
  return cudaGraphInstantiateWithFlags(x, g, f);
}
API cudaError_t cudaGraphUpload(cudaGraphExec_t x, cudaStream_t s) { return cudaSuccess; }
API cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
  LOCKED;
  Capture *c = ((Graph *)x)->capture;
  for (size_t i = 0; i < c->use_count; i++) {
    Block *b = block_of((void *)c->uses[i].at);
    if (b && b->serial == c->uses[i].serial) continue;
    complain("graph %lu is launched, but memory that it uses was freed", c->id);
    return fail(cudaErrorIllegalAddress);
  }
  char name[64];
  snprintf(name, sizeof name, "%lu of %ld nodes", c->id, c->nodes);
  return submit((Work){"graph", name, ONE, ONE, 0, c->ms + 1e-3, 0, 0}, stream_of(s));
}
API cudaError_t cudaGraphDestroy(cudaGraph_t g) { return free(g), cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
  say("graph\tfree\t%lu", ((Graph *)x)->capture->id);
  free(x);
  return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) {
  size_t have = (size_t)((Graph *)g)->capture->nodes;
  if (nodes) memset(nodes, 0, MIN(*n, have) * sizeof *nodes);
  return *n = have, cudaSuccess;
}
API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *d, cudaGraphEdgeData *e,
                                             size_t *n) {
  return *n = 0, cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t g, cudaUserObject_t o, unsigned c, unsigned f) {
  return cudaSuccess;
}
API cudaError_t cudaUserObjectCreate(cudaUserObject_t *o, void *p, cudaHostFn_t d, unsigned r, unsigned f) {
  return *o = (cudaUserObject_t)p, cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t o, unsigned c) { return cudaSuccess; }

/* ==================================================================================================================
 * Runtime: kernels that nvcc compiled into libraries. Registered by their host stub's address. */

enum { NO_ANSWER, FILLS, ASKS_ALL, ASKS_ANY, COUNTS, CASTS, COMPUTES };
typedef struct {
  const void *stub;
  const char *name; /* mangled at first, then what a reader knows */
  int demangled, dynamic;
  int answer; /* what it leaves in memory although it is not executed */
  size_t element;
} Function;
static Function *functions; /* an open hash table */
static size_t function_count, function_room;

static Function *function_slot(const void *stub) {
  size_t i = ((uintptr_t)stub >> 4) * 0x9E3779B97F4A7C15u & (function_room - 1);
  while (functions[i].stub && functions[i].stub != stub) i = (i + 1) & (function_room - 1);
  return &functions[i];
}
static void grow_functions(void) {
  Function *old = functions;
  size_t room = function_room;
  function_room = room ? 2 * room : 1 << 14;
  functions = calloc(function_room, sizeof *functions);
  for (size_t i = 0; i < room; i++)
    if (old[i].stub) *function_slot(old[i].stub) = old[i];
  free(old);
}
/* The kernel of a stub; one that nobody registered is made here, so that it is counted all the same. */
static Function *function_of(const void *stub) {
  if (!function_room) grow_functions();
  Function *f = function_slot(stub);
  if (!f->stub) {
    if (2 * ++function_count > function_room) {
      grow_functions();
      f = function_slot(stub);
    }
    *f = (Function){.stub = stub, .name = "unregistered", .demangled = 1};
  }
  return f;
}
/* Kernels of ATen whose results programs read back to decide something. The results of others that are small become 0,
 * so that nobody reads what a copy left there for another tensor. */
static void find_answer(Function *f) {
  static const struct {
    const char *type;
    size_t size;
  } types[] = {{"float>", 4},       {"double>", 8},        {"int>", 4},   {"long>", 8},          {"bool>", 1},
               {"signed char>", 1}, {"unsigned char>", 1}, {"short>", 2}, {"c10::BFloat16>", 2}, {"c10::Half>", 2}};
  const char *fill = strstr(f->name, "FillFunctor<");
  int elementwise = strstr(f->name, "vectorized_elementwise_kernel") || strstr(f->name, "unrolled_elementwise_kernel");
  if (elementwise) f->answer = COMPUTES;
  if (fill && elementwise)
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
      if (!strncmp(fill + 12, types[i].type, strlen(types[i].type))) f->answer = FILLS, f->element = types[i].size;
  if (strstr(f->name, "reduce_kernel<") && strstr(f->name, "and_kernel_cuda")) f->answer = ASKS_ALL;
  if (strstr(f->name, "reduce_kernel<") && strstr(f->name, "or_kernel_cuda")) f->answer = ASKS_ANY;
  if (strstr(f->name, "unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda") &&
      strstr(f->name, "{lambda(bool)"))
    f->answer = CASTS;
  if (strstr(f->name, "cub::") && strstr(f->name, "DeviceReduceSingleTileKernel")) f->answer = COUNTS;
}
static void give_answer(const Function *f, void **arguments) {
  if (f->answer == FILLS) { /* (int n, T value, char *data) */
    size_t n = (size_t)*(int *)arguments[0] * f->element;
    uintptr_t at = *(uintptr_t *)arguments[2];
    if (n > copy_limit() || !in_space(at) || !allocated(at, n)) return;
    for (size_t i = 0; i < n; i += f->element) memcpy((char *)shadow_of((void *)at) + i, arguments[1], f->element);
  } else if (f->answer == COMPUTES) {            /* (int n, function, char *data[]), the result's first */
    size_t n = (size_t)*(int *)arguments[0] * 8; /* the widest element: what lies behind may become 0 as well */
    uintptr_t at = *(uintptr_t *)arguments[2];
    if (n <= 1 << 15 && in_space(at) && allocated(at, n)) memset(shadow_of((void *)at), 0, n);
  } else if (f->answer == CASTS) { /* (int n, function, char *data[2]): one number to a bool, as any() of one does */
    uintptr_t *data = arguments[2];
    uint32_t value;
    if (*(int *)arguments[0] != 1 || !in_space(data[0]) || !in_space(data[1]) || !allocated(data[0], 1) ||
        !allocated(data[1], 4))
      return;
    memcpy(&value, shadow_of((void *)data[1]), 4);
    *(char *)shadow_of((void *)data[0]) = value != 0;
  } else if (f->answer == COUNTS) { /* (input, int *result, ...) */
    uintptr_t at = *(uintptr_t *)arguments[1];
    if (in_space(at) && allocated(at, 4)) memset(shadow_of((void *)at), 0, 4);
  } else {
    /* One structure; in it source, result and a second result, which there is none of. Arrays before them end in what
     * the stack held, which may look alike: each place that does gets the answer, if a tensor of one number may lie
     * there. */
    const uintptr_t *word = arguments[0];
    for (int i = 0; i < 256; i++)
      if (in_space(word[i]) && in_space(word[i + 1]) && !word[i + 2] && word[i + 1] % 512 == 0 &&
          block_of((void *)word[i]) && block_of((void *)word[i + 1]))
        *(char *)shadow_of((void *)word[i + 1]) = f->answer == ASKS_ALL;
  }
}
static const char *function_name(Function *f) {
  if (f->demangled) return f->name;
  f->demangled = 1;
  static char *(*demangle)(const char *, char *, size_t *, int *);
  if (!demangle) { /* torch brings it, in a scope of its own */
    void *library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    if (library) demangle = (char *(*)(const char *, char *, size_t *, int *))dlsym(library, "__cxa_demangle");
  }
  int status = -1;
  char *readable = demangle ? demangle(f->name, NULL, NULL, &status) : NULL;
  if (status || !readable) return f->name;
  if (strlen(readable) > 600) strcpy(readable + 597, "...");
  for (char *c = readable; *c; c++)
    if (*c == '\t' || *c == '\n') *c = ' ';
  f->name = readable;
  find_answer(f);
  return f->name;
}
API void **__cudaRegisterFatBinary(void *image) {
  static void *handle[1];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void **h) {}
API void __cudaUnregisterFatBinary(void **h) {}
API char __cudaInitModule(void **h) { return 1; }
API void __cudaRegisterFunction(void **h, const char *stub, char *dev, const char *name, int threads, void *t, void *b,
                                void *bd, void *gd, int *w) {
  LOCKED;
  Function *f = function_of(stub);
  f->name = name;
  f->demangled = 0;
}

/* Variables on the device get memory when their address is first asked for. */
typedef struct {
  const void *symbol;
  size_t size;
  void *at;
} Variable;
static Variable variables[4096];
static size_t variable_count;
API void __cudaRegisterVar(void **h, char *symbol, char *dev, const char *name, int e, size_t size, int constant,
                           int global) {
  LOCKED;
  if (variable_count < 4096) variables[variable_count++] = (Variable){symbol, size, NULL};
}
API void __cudaRegisterManagedVar(void **h, void **symbol, char *dev, const char *name, int e, size_t size,
                                  int constant, int global) {
  __cudaRegisterVar(h, (char *)symbol, dev, name, e, size, constant, global);
}
API cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  LOCKED;
  for (size_t i = 0; i < variable_count; i++) {
    Variable *v = &variables[i];
    if (v->symbol != symbol) continue;
    if (!v->at) {
      v->at = (void *)take_addresses(MAX(v->size, 512), 512);
      add_block((uintptr_t)v->at, MAX(v->size, 512), DEVICE_MEMORY);
    }
    return *p = v->at, cudaSuccess;
  }
  return fail(cudaErrorInvalidSymbol);
}
API cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *s, size_t n, size_t offset, enum cudaMemcpyKind k) {
  void *at;
  cudaError_t error = cudaGetSymbolAddress(&at, symbol);
  return error ? error : cudaMemcpy((char *)at + offset, s, n, k);
}

static _Thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pushed[8];
static _Thread_local unsigned pushed_count;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shared, struct CUstream_st *s) {
  unsigned i = pushed_count++ & 7;
  pushed[i].grid = g, pushed[i].block = b, pushed[i].shared = shared, pushed[i].stream = s;
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *shared, void *s) {
  unsigned i = --pushed_count & 7;
  *g = pushed[i].grid, *b = pushed[i].block, *shared = pushed[i].shared, *(cudaStream_t *)s = pushed[i].stream;
  return cudaSuccess;
}
static cudaError_t launch(const void *stub, dim3 g, dim3 b, void **arguments, size_t shared, cudaStream_t s) {
  LOCKED;
  Function *f = function_of(stub);
  const char *name = function_name(f);
  cudaError_t error = check_configuration(name, g, b, shared, f->dynamic);
  if (error) return error;
  if (f->answer && arguments && !stream_of(s)->capture) give_answer(f, arguments);
  return submit((Work){"kernel", name, g, b, shared, 0, 0, 0}, stream_of(s));
}
API cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) {
  return launch(f, g, b, a, m, s);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) {
  return launch(f, g, b, a, m, s);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
  return launch(f, c->gridDim, c->blockDim, a, c->dynamicSmemBytes, c->stream);
}
API cudaError_t __cudaGetKernel(cudaKernel_t *k, const void *f) { return *k = (cudaKernel_t)f, cudaSuccess; }
API cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void **a, size_t m, cudaStream_t s) {
  return launch((const void *)k, g, b, a, m, s);
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  LOCKED;
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 10 * card()->major + card()->minor;
  a->maxDynamicSharedSizeBytes = MAX(function_of(f)->dynamic, 49152);
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) {
  LOCKED;
  if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (v > card()->shared_optin) {
    complain("kernel %s asks for %d bytes of shared memory, a block may have %d", function_name(function_of(f)), v,
             card()->shared_optin);
    return fail(cudaErrorInvalidValue);
  }
  function_of(f)->dynamic = v;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetCacheConfig(const void *f, enum cudaFuncCache c) { return cudaSuccess; }
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t k, enum cudaFuncAttribute a, int v, int d) {
  return cudaFuncSetAttribute((const void *)k, a, v);
}

/* By threads and shared memory; the registers of these kernels are not known. */
static int resident_blocks(int threads, size_t shared) {
  int n = 2048 / MAX(threads, 1);
  if (shared) n = MIN(n, card()->shared_processor / ((int)shared + 1024));
  return MIN(n, 32);
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t m) {
  return *n = resident_blocks(b, m), cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t m,
                                                                       unsigned fl) {
  return *n = resident_blocks(b, m), cudaSuccess;
}

/* ==================================================================================================================
 * Driver: devices and contexts */

API CUresult cuInit(unsigned f) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int *v) { return *v = CUDART_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *n) { return *n = device_count(), CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *d, int n) {
  if (n < 0 || n >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  return *d = n, CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char *s, int n, CUdevice d) {
  return snprintf(s, (size_t)n, "%s", card()->name), CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  return *v = attribute((int)a), CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem(size_t *n, CUdevice d) { return *n = memory_size(), CUDA_SUCCESS; }
API CUresult cuDeviceGetUuid(CUuuid *u, CUdevice d) { return memset(u, d + 1, sizeof *u), CUDA_SUCCESS; }
/* One context a device: its address tells which. */
static char contexts[MAX_DEVICES];
API CUresult cuCtxGetCurrent(CUcontext *c) { return *c = (CUcontext)&contexts[device], CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext c) {
  if (c) device = (int)((char *)c - contexts);
  return CUDA_SUCCESS;
}
API CUresult cuCtxPushCurrent(CUcontext c) { return cuCtxSetCurrent(c); }
API CUresult cuCtxPopCurrent(CUcontext *c) { return c ? cuCtxGetCurrent(c) : CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice *d) { return *d = device, CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t *n, CUlimit l) { return *n = 8 << 20, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit l, size_t n) { return CUDA_SUCCESS; }
API CUresult cuCtxSynchronize(void) {
  return wait("cuCtxSynchronize") ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { return *c = (CUcontext)&contexts[d], CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRelease(CUdevice d) { return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *active) {
  return *f = 0, *active = 1, CUDA_SUCCESS;
}
static const struct {
  CUresult code;
  const char *name, *text;
} driver_errors[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};
static CUresult driver_error_text(CUresult code, const char **out, int name) {
  for (size_t i = 0; i < sizeof driver_errors / sizeof *driver_errors; i++)
    if (driver_errors[i].code == code) return *out = name ? driver_errors[i].name : driver_errors[i].text, CUDA_SUCCESS;
  return *out = "unknown error", CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult r, const char **s) { return driver_error_text(r, s, 0); }
API CUresult cuGetErrorName(CUresult r, const char **s) { return driver_error_text(r, s, 1); }

/* Functions are asked for by name: the newest version of each is the one that is here. torch wants all that it knows at
 * once, among them some for several processes, multicast and parts of a GPU, which refuse when they are called. */
static CUresult refuse(void) { return CUDA_ERROR_NOT_SUPPORTED; }
static void *entry_point(const char *name) {
  static const char *const suffixes[] = {"_v3", "_v2", ""};
  static const char *const refused[] = {
      "cuMemExport",    "cuMemImport",   "cuMemRetain",        "cuMulticast",
      "cuGreenCtx",     "cuDevResource", "cuDevSmResource",    "cuDeviceGetDevResource",
      "cuCtxFromGreen", "cuLogs",        "cuStreamWriteValue", "cuMemGetAllocationPropertiesFromHandle"};
  char versioned[160];
  for (int i = 0; i < 3; i++) {
    snprintf(versioned, sizeof versioned, "%s%s", name, suffixes[i]);
    void *found = dlsym(RTLD_DEFAULT, versioned);
    if (found) return found;
  }
  for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
    if (!strncmp(name, refused[i], strlen(refused[i]))) return (void *)refuse;
  return NULL;
}
API CUresult cuGetProcAddress(const char *name, void **f, int v, cuuint64_t flags, CUdriverProcAddressQueryResult *r) {
  *f = entry_point(name);
  if (r) *r = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *r) {
  *f = entry_point(name);
  if (r) *r = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API CUresult cuGetExportTable(const void **t, const CUuuid *id) { return *t = NULL, CUDA_ERROR_NOT_FOUND; }

/* ==================================================================================================================
 * Driver: modules and kernels (Triton's). The cubin is read, so that registers, stack and the check of pointers are
 * those of the kernel that would run. */

#define MAX_PARAMETERS 256
typedef struct Kernel {
  char name[256];
  int registers, stack, fixed_shared, dynamic;
  struct {
    int size;
  } parameters[MAX_PARAMETERS];
  int parameter_count;
  struct Kernel *next;
} Kernel;
typedef struct {
  Kernel *kernels;
} Module;

static Kernel *kernel_in(Module *m, const char *name, int make) {
  for (Kernel *k = m->kernels; k; k = k->next)
    if (!strcmp(k->name, name)) return k;
  if (!make) return NULL;
  Kernel *k = calloc(1, sizeof *k);
  snprintf(k->name, sizeof k->name, "%s", name);
  k->registers = 32;
  k->next = m->kernels;
  return m->kernels = k;
}

/* Attributes of .nv.info: format, code, then two bytes that are the value or, in format 4, the length of what follows.
 */
enum { FORMAT_SIZED = 4, INFO_MIN_STACK = 0x12, INFO_PARAMETER = 0x17, INFO_REGISTERS = 0x2f };
static void read_info(Module *m, const uint8_t *data, size_t size, Kernel *of, const Elf64_Sym *symbols,
                      const char *names) {
  for (size_t at = 0; at + 4 <= size;) {
    const uint8_t *entry = data + at, *value = entry + 4;
    size_t length = entry[0] == FORMAT_SIZED ? (size_t)(entry[2] | entry[3] << 8) : 0;
    at += 4 + length;
    if (!length || at > size) continue;
    uint32_t word[3] = {0};
    memcpy(word, value, MIN(length, sizeof word));
    if (of && entry[1] == INFO_PARAMETER) {
      int ordinal = (int)(word[1] & 0xffff);
      if (ordinal >= MAX_PARAMETERS) continue;
      of->parameters[ordinal].size = (int)(word[2] >> 18);
      of->parameter_count = MAX(of->parameter_count, ordinal + 1);
    } else if (!of && (entry[1] == INFO_REGISTERS || entry[1] == INFO_MIN_STACK) && symbols) {
      Kernel *k = kernel_in(m, names + symbols[word[0]].st_name, 1);
      *(entry[1] == INFO_REGISTERS ? &k->registers : &k->stack) = (int)word[1];
    }
  }
}
static void read_cubin(Module *m, const uint8_t *image) {
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *section_names = (const char *)image + sections[head->e_shstrndx].sh_offset;
  const Elf64_Sym *symbols = NULL;
  const char *names = NULL;
  for (int i = 0; i < head->e_shnum; i++)
    if (sections[i].sh_type == SHT_SYMTAB) {
      symbols = (const Elf64_Sym *)(image + sections[i].sh_offset);
      names = (const char *)image + sections[sections[i].sh_link].sh_offset;
    }
  for (int i = 0; i < head->e_shnum; i++) {
    const char *name = section_names + sections[i].sh_name;
    const uint8_t *data = image + sections[i].sh_offset;
    if (!strcmp(name, ".nv.info"))
      read_info(m, data, sections[i].sh_size, NULL, symbols, names);
    else if (!strncmp(name, ".nv.info.", 9))
      read_info(m, data, sections[i].sh_size, kernel_in(m, name + 9, 1), symbols, names);
    else if (!strncmp(name, ".nv.shared.", 11))
      kernel_in(m, name + 11, 1)->fixed_shared = (int)sections[i].sh_size;
  }
}
API CUresult cuModuleLoadData(CUmodule *out, const void *image) {
  LOCKED;
  cudaError_t error = forbidden("cuModuleLoadData");
  if (error) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  Module *m = calloc(1, sizeof *m);
  if (!memcmp(image, ELFMAG, SELFMAG)) read_cubin(m, image);
  return *out = (CUmodule)m, CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **v) {
  return cuModuleLoadData(m, image);
}
API CUresult cuModuleLoad(CUmodule *m, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  char *image = calloc(1, (size_t)MAX(size, 64));
  size_t n = fread(image, 1, (size_t)size, file);
  fclose(file);
  CUresult result = n == (size_t)size ? cuModuleLoadData(m, image) : CUDA_ERROR_INVALID_IMAGE;
  free(image);
  return result;
}
API CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; } /* functions of it may still be held */
API CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  LOCKED;
  Kernel *k = kernel_in((Module *)m, name, !((Module *)m)->kernels);
  if (!k) return CUDA_ERROR_NOT_FOUND;
  return *f = (CUfunction)k, CUDA_SUCCESS;
}
API CUresult cuFuncLoad(CUfunction f) { return CUDA_SUCCESS; }
API CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
API CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  Kernel *k = (Kernel *)f;
  switch (a) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *v = k->registers; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *v = k->stack; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *v = k->fixed_shared; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *v = MIN(1024, 65536 / MAX(k->registers, 1) / 32 * 32); break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *v = MAX(k->dynamic, 49152); break;
    default: *v = 0;
  }
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  Kernel *k = (Kernel *)f;
  if (a >= CU_FUNC_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
  if (a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (v + k->fixed_shared > card()->shared_optin) {
    complain("kernel %s asks for %d bytes of shared memory, a block may have %d", k->name, v + k->fixed_shared,
             card()->shared_optin);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return k->dynamic = v, CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int threads, size_t shared) {
  Kernel *k = (Kernel *)f;
  int by_registers = 65536 / MAX(k->registers * threads, 1);
  return *n = MIN(resident_blocks(threads, shared + (size_t)k->fixed_shared), by_registers), CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  return *n = card()->processors / 4, CUDA_SUCCESS;
}

/* A tensor map keeps what it points at, so that a launch can check it as it does plain pointers. */
#define MAP_MARK 0x5354414e44494e00ull
API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                    const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                    const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle swizzle,
                                    CUtensorMapL2promotion p, CUtensorMapFloatOOBfill f) {
  const char *wrong = (uintptr_t)address & 15 ? "an address that is not aligned to 16 bytes"
                      : rank < 1 || rank > 5  ? "a rank outside 1 to 5"
                                              : NULL;
  for (cuuint32_t d = 0; !wrong && d < rank; d++) {
    if (!dims[d] || dims[d] > (1ull << 32)) wrong = "a dimension outside 1 to 2^32";
    if (!box[d] || box[d] > 256) wrong = "a box outside 1 to 256";
    if (!steps[d] || steps[d] > 8) wrong = "a step outside 1 to 8";
    if (d + 1 < rank && (strides[d] & 15 || strides[d] >= 1ull << 40))
      wrong = "a stride that is no multiple of 16 bytes";
  }
  if (wrong) {
    complain("a tensor map (TMA) has %s", wrong);
    return CUDA_ERROR_INVALID_VALUE;
  }
  memset(map, 0, sizeof *map);
  map->opaque[0] = MAP_MARK;
  map->opaque[1] = (cuuint64_t)(uintptr_t)address;
  return CUDA_SUCCESS;
}

/* Pointers to memory that is not allocated (freed, or never handed out). One past the end passes: it is that of an
 * empty view. */
static void check_parameters(Kernel *k, void **parameters, Stream *s) {
  for (int i = 0; parameters && i < k->parameter_count; i++) {
    if (k->parameters[i].size != 8 && k->parameters[i].size != 128) continue;
    uint64_t word[2];
    memcpy(word, parameters[i], k->parameters[i].size == 8 ? 8 : 16);
    if (k->parameters[i].size == 128 && word[0] != MAP_MARK) continue;
    uintptr_t p = k->parameters[i].size == 8 ? word[0] : word[1];
    if (!in_space(p)) continue;
    if (!block_of((void *)p) && !block_of((void *)(p - 1)))
      complain("kernel %s: argument %d points to memory that is not allocated", k->name, i);
    note_use(s, (void *)p);
  }
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  LOCKED;
  Kernel *k = (Kernel *)f;
  Stream *s = stream_of((cudaStream_t)c->hStream);
  dim3 g = {c->gridDimX, c->gridDimY, c->gridDimZ}, b = {c->blockDimX, c->blockDimY, c->blockDimZ};
  if (check_configuration(k->name, g, b, c->sharedMemBytes, k->dynamic)) return CUDA_ERROR_INVALID_VALUE;
  if ((size_t)k->registers * b.x * b.y * b.z > 65536) {
    complain("kernel %s needs %d registers for each of %u threads, more than a block may have", k->name, k->registers,
             b.x * b.y * b.z);
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  }
  check_parameters(k, parameters, s);
  return submit((Work){"triton", k->name, g, b, c->sharedMemBytes, 0, 0, 0}, s) ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
                                                                                : CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, CUstream s, void **p, void **e) {
  CUlaunchConfig c = {.gridDimX = gx,
                      .gridDimY = gy,
                      .gridDimZ = gz,
                      .blockDimX = bx,
                      .blockDimY = by,
                      .blockDimZ = bz,
                      .sharedMemBytes = shared,
                      .hStream = s};
  return cuLaunchKernelEx(&c, f, p, e);
}
API CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                       unsigned bz, unsigned shared, CUstream s, void **p) {
  return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, s, p, NULL);
}

/* ==================================================================================================================
 * Driver: memory. Pointers' attributes, and addresses that are reserved, backed and mapped apart (torch's expandable
 * segments). */

static CUresult pointer_attribute(void *out, CUpointer_attribute a, CUdeviceptr p) {
  Block *b = block_of((void *)p);
  if (!b) return CUDA_ERROR_INVALID_VALUE;
  switch (a) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)out = p; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(void **)out = b->kind == DEVICE_MEMORY ? NULL : (void *)p; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *(unsigned *)out = b->kind == DEVICE_MEMORY ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)out = b->device; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)out = b->at; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)out = b->size; break;
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)out = (CUcontext)&contexts[b->device]; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)out = b->serial; break;
    default: *(int *)out = 0;
  }
  return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p) {
  LOCKED;
  return pointer_attribute(out, a, p);
}
API CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **out, CUdeviceptr p) {
  LOCKED;
  for (unsigned i = 0; i < n; i++)
    if (pointer_attribute(out[i], a[i], p)) *(void **)out[i] = NULL;
  return CUDA_SUCCESS;
}
API CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr p) {
  LOCKED;
  Block *b = block_of((void *)p);
  if (!b) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = b->at;
  if (size) *size = b->size;
  return CUDA_SUCCESS;
}

API CUresult cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) {
  LOCKED;
  Stream *stream = stream_of((cudaStream_t)s);
  note_use(stream, (void *)p);
  if (!stream->capture && 4 * n <= copy_limit() && allocated(p, 4 * n))
    for (size_t i = 0; i < n; i++) ((unsigned *)shadow_of((void *)p))[i] = v;
  return submit((Work){"memset", "memset", ONE, ONE, 0, 0, 4.0 * (double)n, 0}, stream) ? CUDA_ERROR_UNKNOWN
                                                                                        : CUDA_SUCCESS;
}

typedef struct {
  size_t size;
  int device, references;
} Backing;
API CUresult cuMemAddressReserve(CUdeviceptr *p, size_t n, size_t alignment, CUdeviceptr at, unsigned long long f) {
  LOCKED;
  return *p = take_addresses(n, MAX(alignment, 2 << 20)), CUDA_SUCCESS;
}
API CUresult cuMemAddressFree(CUdeviceptr p, size_t n) { return CUDA_SUCCESS; }
API CUresult cuMemGetAllocationGranularity(size_t *n, const CUmemAllocationProp *p,
                                           CUmemAllocationGranularity_flags f) {
  return *n = 2 << 20, CUDA_SUCCESS;
}
API CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t n, const CUmemAllocationProp *p,
                         unsigned long long f) {
  LOCKED;
  int before = device;
  if (p && p->location.type == CU_MEM_LOCATION_TYPE_DEVICE) device = p->location.id;
  int fits = charge(n);
  Backing *b = calloc(1, sizeof *b);
  *b = (Backing){n, device, 1};
  device = before;
  *h = (CUmemGenericAllocationHandle)(uintptr_t)b;
  return fits ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
static void drop_backing(Backing *b) {
  if (--b->references) return;
  discharge(b->size, b->device);
  free(b);
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle h) {
  LOCKED;
  drop_backing((Backing *)(uintptr_t)h);
  return CUDA_SUCCESS;
}
typedef struct Mapping {
  uintptr_t at;
  Backing *backing;
  struct Mapping *next;
} Mapping;
static Mapping *mappings;
API CUresult cuMemMap(CUdeviceptr p, size_t n, size_t offset, CUmemGenericAllocationHandle h, unsigned long long f) {
  LOCKED;
  Backing *b = (Backing *)(uintptr_t)h;
  int before = device;
  device = b->device;
  add_block(p, n, DEVICE_MEMORY);
  device = before;
  b->references++;
  Mapping *m = malloc(sizeof *m);
  *m = (Mapping){p, b, mappings};
  mappings = m;
  return CUDA_SUCCESS;
}
API CUresult cuMemUnmap(CUdeviceptr p, size_t n) {
  LOCKED;
  for (Mapping **link = &mappings; *link;) {
    Mapping *m = *link;
    if (m->at < p || m->at >= p + n) {
      link = &m->next;
      continue;
    }
    Block *b = block_of((void *)m->at);
    forget_bytes(b->at, b->size);
    drop_block(b);
    drop_backing(m->backing);
    *link = m->next;
    free(m);
  }
  return CUDA_SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr p, size_t n, const CUmemAccessDesc *d, size_t k) { return CUDA_SUCCESS; }

/* ==================================================================================================================
 * Matrix products: cuBLAS and cuBLASLt */

static size_t type_size(cudaDataType t) {
  switch (t) {
    case CUDA_R_8I:
    case CUDA_R_8U:
    case CUDA_R_8F_E4M3:
    case CUDA_R_8F_E5M2: return 1;
    case CUDA_R_16F:
    case CUDA_R_16BF: return 2;
    case CUDA_R_64F:
    case CUDA_C_32F: return 8;
    case CUDA_C_64F: return 16;
    default: return 4;
  }
}
static const char *type_name(cudaDataType t) {
  switch (t) {
    case CUDA_R_8F_E4M3: return "e4m3";
    case CUDA_R_8F_E5M2: return "e5m2";
    case CUDA_R_16F: return "f16";
    case CUDA_R_16BF: return "bf16";
    case CUDA_R_32F: return "f32";
    case CUDA_R_64F: return "f64";
    case CUDA_R_8I: return "i8";
    default: return "other";
  }
}
static double type_rate(cudaDataType t) { /* operations a ms */
  const Card *c = card();
  double peak = t == CUDA_R_32F ? c->fp32 : t == CUDA_R_64F ? c->fp64 : type_size(t) == 1 ? c->fp8 : c->bf16;
  return 0.65e9 * peak;
}

typedef struct {
  const char *library;
  long m, n, k, batch;
  cudaDataType a_type, b_type, d_type;
  const void *a, *b, *d;
  int reads_d;  /* beta is not 0 */
  double extra; /* bytes of bias and auxiliary tensors */
} Product;
static cudaError_t multiply(Product p, cudaStream_t stream) {
  LOCKED;
  Stream *s = stream_of(stream);
  double m = (double)p.m, n = (double)p.n, k = (double)p.k, batch = (double)p.batch;
  double bytes = batch * (m * k * (double)type_size(p.a_type) + k * n * (double)type_size(p.b_type) +
                          m * n * (double)type_size(p.d_type) * (p.reads_d ? 2 : 1)) +
                 p.extra;
  double flops = 2 * m * n * k * batch,
         ms = 2e-3 + MAX(flops / type_rate(p.a_type), bytes / (0.85 * card()->bandwidth));
  const void *operands[] = {p.a, p.b, p.d};
  for (int i = 0; i < 3; i++) {
    if (in_space((uintptr_t)operands[i]) && !block_of(operands[i]))
      complain("%s: operand %c is not allocated", p.library, "ABD"[i]);
    note_use(s, operands[i]);
  }
  char name[160];
  snprintf(name, sizeof name, "%s m%ld n%ld k%ld b%ld %s%s%s", p.library, p.m, p.n, p.k, p.batch, type_name(p.a_type),
           p.a_type == p.d_type ? "" : " to ", p.a_type == p.d_type ? "" : type_name(p.d_type));
  return submit((Work){"gemm", name, ONE, ONE, 0, ms, bytes, flops}, s);
}

typedef struct {
  cudaStream_t stream;
  cublasMath_t math;
  cublasPointerMode_t mode;
} Blas;
#define BLAS(h) ((Blas *)(h))
static cublasStatus_t status(cudaError_t e) { return e ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS; }
static int nonzero(cublasHandle_t h, const void *scalar, size_t size) {
  static const char zeros[16];
  return scalar && BLAS(h)->mode == CUBLAS_POINTER_MODE_HOST && memcmp(scalar, zeros, size);
}
API cublasStatus_t cublasCreate_v2(cublasHandle_t *h) { return *h = calloc(1, sizeof(Blas)), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasDestroy_v2(cublasHandle_t h) { return free(h), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
  return BLAS(h)->stream = s, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetStream_v2(cublasHandle_t h, cudaStream_t *s) {
  return *s = BLAS(h)->stream, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *w, size_t n) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetMathMode(cublasHandle_t h, cublasMath_t m) {
  return BLAS(h)->math = m, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetMathMode(cublasHandle_t h, cublasMath_t *m) {
  return *m = BLAS(h)->math, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t m) {
  return BLAS(h)->mode = m, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t h, cublasPointerMode_t *m) {
  return *m = BLAS(h)->mode, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSetSmCountTarget(cublasHandle_t h, int n) { return CUBLAS_STATUS_SUCCESS; }

static size_t scalar_size(cublasComputeType_t c) {
  return c == CUBLAS_COMPUTE_64F || c == CUBLAS_COMPUTE_64F_PEDANTIC   ? 8
         : c == CUBLAS_COMPUTE_16F || c == CUBLAS_COMPUTE_16F_PEDANTIC ? 2
                                                                       : 4;
}
API cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                const void *alpha, const void *a, cudaDataType at, int lda, const void *b,
                                cudaDataType bt, int ldb, const void *beta, void *c, cudaDataType ct, int ldc,
                                cublasComputeType_t compute, cublasGemmAlgo_t algo) {
  return status(
      multiply((Product){"cublas", m, n, k, 1, at, bt, ct, a, b, c, nonzero(h, beta, scalar_size(compute)), 0},
               BLAS(h)->stream));
}
API cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,
                                              int n, int k, const void *alpha, const void *a, cudaDataType at, int lda,
                                              long long sa, const void *b, cudaDataType bt, int ldb, long long sb,
                                              const void *beta, void *c, cudaDataType ct, int ldc, long long sc,
                                              int batch, cublasComputeType_t compute, cublasGemmAlgo_t algo) {
  return status(
      multiply((Product){"cublas", m, n, k, batch, at, bt, ct, a, b, c, nonzero(h, beta, scalar_size(compute)), 0},
               BLAS(h)->stream));
}
API cublasStatus_t cublasSgemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                 const float *alpha, const void *a, cudaDataType at, int lda, const void *b,
                                 cudaDataType bt, int ldb, const float *beta, void *c, cudaDataType ct, int ldc) {
  return status(
      multiply((Product){"cublas", m, n, k, 1, at, bt, ct, a, b, c, nonzero(h, beta, 4), 0}, BLAS(h)->stream));
}
/* One product, one of a batch at a stride, one of a batch of pointers (which lie on the device), a vector's. */
#define TYPED_PRODUCTS(X, T, TYPE)                                                                                     \
  API cublasStatus_t cublas##X##gemm_v2(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n,    \
                                        int k, const T *al, const T *a, int la, const T *b, int lb, const T *be, T *c, \
                                        int lc) {                                                                      \
    return status(multiply((Product){"cublas", m, n, k, 1, TYPE, TYPE, TYPE, a, b, c, nonzero(h, be, sizeof *be), 0},  \
                           BLAS(h)->stream));                                                                          \
  }                                                                                                                    \
  API cublasStatus_t cublas##X##gemmStridedBatched(                                                                    \
      cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const T *al, const T *a,      \
      int la, long long sa, const T *b, int lb, long long sb, const T *be, T *c, int lc, long long sc, int batch) {    \
    return status(                                                                                                     \
        multiply((Product){"cublas", m, n, k, batch, TYPE, TYPE, TYPE, a, b, c, nonzero(h, be, sizeof *be), 0},        \
                 BLAS(h)->stream));                                                                                    \
  }                                                                                                                    \
  API cublasStatus_t cublas##X##gemmBatched(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m,       \
                                            int n, int k, const T *al, const T *const a[], int la, const T *const b[], \
                                            int lb, const T *be, T *const c[], int lc, int batch) {                    \
    return status(multiply(                                                                                            \
        (Product){"cublas", m, n, k, batch, TYPE, TYPE, TYPE, NULL, NULL, NULL, nonzero(h, be, sizeof *be), 0},        \
        BLAS(h)->stream));                                                                                             \
  }                                                                                                                    \
  API cublasStatus_t cublas##X##gemv_v2(cublasHandle_t h, cublasOperation_t t, int m, int n, const T *al, const T *a,  \
                                        int la, const T *x, int ix, const T *be, T *y, int iy) {                       \
    return status(multiply((Product){"cublas", m, 1, n, 1, TYPE, TYPE, TYPE, a, x, y, nonzero(h, be, sizeof *be), 0},  \
                           BLAS(h)->stream));                                                                          \
  }                                                                                                                    \
  API cublasStatus_t cublas##X##trsm_v2(cublasHandle_t h, cublasSideMode_t side, cublasFillMode_t u,                   \
                                        cublasOperation_t t, cublasDiagType_t d, int m, int n, const T *al,            \
                                        const T *a, int la, T *b, int lb) {                                            \
    int k = side == CUBLAS_SIDE_LEFT ? m : n;                                                                          \
    return status(multiply((Product){"cublas trsm", m, n, k, 1, TYPE, TYPE, TYPE, a, b, b, 0, 0}, BLAS(h)->stream));   \
  }
TYPED_PRODUCTS(S, float, CUDA_R_32F)
TYPED_PRODUCTS(D, double, CUDA_R_64F)
TYPED_PRODUCTS(C, cuComplex, CUDA_C_32F)
TYPED_PRODUCTS(Z, cuDoubleComplex, CUDA_C_64F)
API cublasStatus_t cublasDotEx(cublasHandle_t h, int n, const void *x, cudaDataType xt, int ix, const void *y,
                               cudaDataType yt, int iy, void *r, cudaDataType rt, cudaDataType c) {
  return status(multiply((Product){"cublas dot", 1, 1, n, 1, xt, yt, rt, x, y, NULL, 0, 0}, BLAS(h)->stream));
}
API cublasStatus_t cublasSdot_v2(cublasHandle_t h, int n, const float *x, int ix, const float *y, int iy, float *r) {
  return cublasDotEx(h, n, x, CUDA_R_32F, ix, y, CUDA_R_32F, iy, r, CUDA_R_32F, CUDA_R_32F);
}
API cublasStatus_t cublasDdot_v2(cublasHandle_t h, int n, const double *x, int ix, const double *y, int iy, double *r) {
  return cublasDotEx(h, n, x, CUDA_R_64F, ix, y, CUDA_R_64F, iy, r, CUDA_R_64F, CUDA_R_64F);
}

/* cuBLASLt. Descriptors are caller's memory in some of its functions, so they hold what is needed in place. */
typedef struct {
  int32_t trans_a, trans_b, epilogue;
  cublasComputeType_t compute;
  void *bias, *aux;
  int64_t aux_ld;
  const void *scale_a, *scale_b;
} LtDesc;
typedef struct {
  cudaDataType type;
  uint64_t rows, cols;
  int64_t ld;
  int32_t batch;
} LtLayout;
typedef struct {
  uint64_t workspace;
  uint32_t alignment[4]; /* of A, B, C, D */
} LtPreference;
typedef struct { /* in a cublasLtMatmulAlgo_t: what the heuristic was promised */
  uint64_t mark;
  uint32_t alignment[4];
} LtAlgo;
#define ALGO_MARK 0x5354414e44414c47ull

API size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }
API size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }
static const char *status_text(cublasStatus_t s) {
  return s == CUBLAS_STATUS_SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
         : s == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
         : s == CUBLAS_STATUS_NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                            : "CUBLAS_STATUS_EXECUTION_FAILED";
}
API const char *cublasLtGetStatusName(cublasStatus_t s) { return status_text(s); }
API const char *cublasLtGetStatusString(cublasStatus_t s) { return status_text(s); }
API cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { return *h = calloc(1, 64), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) { return free(h), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t compute, cudaDataType scale) {
  LtDesc *x = calloc(1, sizeof *x);
  x->compute = compute;
  x->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  return *d = (cublasLtMatmulDesc_t)x, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return free(d), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a,
                                                  const void *v, size_t n) {
  LtDesc *x = (LtDesc *)d;
  struct {
    cublasLtMatmulDescAttributes_t attribute;
    void *at;
    size_t size;
  } known[] = {
      {CUBLASLT_MATMUL_DESC_TRANSA, &x->trans_a, 4},           {CUBLASLT_MATMUL_DESC_TRANSB, &x->trans_b, 4},
      {CUBLASLT_MATMUL_DESC_EPILOGUE, &x->epilogue, 4},        {CUBLASLT_MATMUL_DESC_BIAS_POINTER, &x->bias, 8},
      {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &x->aux, 8}, {CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &x->aux_ld, 8},
      {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &x->scale_a, 8},  {CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x->scale_b, 8},
  };
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    if (known[i].attribute != a) continue;
    if (n < known[i].size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(known[i].at, v, known[i].size);
  }
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType type, uint64_t rows,
                                              uint64_t cols, int64_t ld) {
  LtLayout *x = calloc(1, sizeof *x);
  *x = (LtLayout){type, rows, cols, ld, 1};
  return *l = (cublasLtMatrixLayout_t)x, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return free(l), CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l, cublasLtMatrixLayoutAttribute_t a,
                                                    const void *v, size_t n) {
  if (a == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT && n >= 4) memcpy(&((LtLayout *)l)->batch, v, 4);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
  LtPreference *x = calloc(1, sizeof *x);
  for (int i = 0; i < 4; i++) x->alignment[i] = 256; /* cuBLASLt's default */
  return *p = (cublasLtMatmulPreference_t)x, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
  return free(p), CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                        cublasLtMatmulPreferenceAttributes_t a, const void *v,
                                                        size_t n) {
  LtPreference *x = (LtPreference *)p;
  int which = (int)a - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
  if (a == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && n >= 8) memcpy(&x->workspace, v, 8);
  if (which >= 0 && which < 4 && n >= 4) memcpy(&x->alignment[which], v, 4);
  return CUBLAS_STATUS_SUCCESS;
}
/* What Hopper's fp8 products need: A transposed, B not, scales, and sizes that are multiples of 16. */
static const char *wrong_for_fp8(const LtDesc *d, const LtLayout *a, const LtLayout *b) {
  if (type_size(a->type) != 1 || a->type == CUDA_R_8I) return NULL;
  if (card()->major < 9) return "an fp8 product on a card without fp8";
  if (card()->major == 9 && (d->trans_a != CUBLAS_OP_T || d->trans_b != CUBLAS_OP_N))
    return "an fp8 product that is not A^T B";
  if (a->rows % 16 || a->cols % 16 || b->rows % 16 || a->ld % 16 || b->ld % 16)
    return "an fp8 product of sizes that are no multiples of 16";
  return NULL;
}
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
                                                  cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                                  cublasLtMatrixLayout_t dd, cublasLtMatmulPreference_t p, int wanted,
                                                  cublasLtMatmulHeuristicResult_t *r, int *n) {
  *n = 0;
  const char *wrong = wrong_for_fp8((LtDesc *)d, (LtLayout *)a, (LtLayout *)b);
  if (wrong) complain("cublasLt: %s", wrong);
  if (wrong || wanted < 1) return CUBLAS_STATUS_NOT_SUPPORTED;
  LtAlgo algo = {.mark = ALGO_MARK};
  memcpy(algo.alignment, ((LtPreference *)p)->alignment, sizeof algo.alignment);
  memset(r, 0, sizeof *r);
  memcpy(&r->algo, &algo, sizeof algo);
  r->wavesCount = 1;
  return *n = 1, CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *alpha, const void *a,
                                  cublasLtMatrixLayout_t al, const void *b, cublasLtMatrixLayout_t bl, const void *beta,
                                  const void *c, cublasLtMatrixLayout_t cl, void *out, cublasLtMatrixLayout_t ol,
                                  const cublasLtMatmulAlgo_t *algo, void *workspace, size_t n, cudaStream_t s) {
  LOCKED;
  LtDesc *desc = (LtDesc *)d;
  LtLayout *x = (LtLayout *)al, *y = (LtLayout *)bl, *z = (LtLayout *)ol;
  const char *wrong = wrong_for_fp8(desc, x, y);
  if (wrong) {
    complain("cublasLt: %s", wrong);
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  LtAlgo chosen = {0};
  if (algo) memcpy(&chosen, algo, sizeof chosen);
  const void *operands[] = {a, b, c, out, desc->bias, desc->aux};
  static const char *const names[] = {"A", "B", "C", "D", "bias", "auxiliary"};
  for (int i = 0; i < 6; i++) {
    if (i == 4 && !(desc->epilogue & (CUBLASLT_EPILOGUE_BIAS | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB)))
      continue;
    if (i == 5 && !(desc->epilogue & 128)) continue;
    uint32_t needs = MAX(16u, i < 4 && chosen.mark == ALGO_MARK ? chosen.alignment[i] : 16u);
    if ((uintptr_t)operands[i] & (needs - 1)) {
      complain("cublasLtMatmul: operand %s is not aligned to %u bytes", names[i], needs);
      return CUBLAS_STATUS_INVALID_VALUE;
    }
  }
  long k = (long)(desc->trans_a ? x->rows : x->cols);
  double size = (double)z->rows * (double)z->cols * (double)z->batch, extra = 0;
  if (desc->epilogue & 128) extra += size * (double)type_size(z->type);
  if (desc->epilogue & CUBLASLT_EPILOGUE_BIAS) extra += (double)z->rows * (double)type_size(z->type);
  static const char zeros[8];
  int reads =
      beta && !in_space((uintptr_t)beta) && memcmp(beta, zeros, desc->compute == CUBLAS_COMPUTE_64F ? 8 : 4) != 0;
  char name[48];
  snprintf(name, sizeof name, "cublasLt epilogue%d", desc->epilogue);
  return status(multiply(
      (Product){name, (long)z->rows, (long)z->cols, k, z->batch, x->type, y->type, z->type, a, b, out, reads, extra},
      s));
}

/* ==================================================================================================================
 * cuDNN's graph interface. Descriptors keep what is set; heuristics name one engine for any graph of operations; what a
 * plan moves and does comes from the tensors of its operations. */

typedef struct {
  cudaStream_t stream;
} Dnn;
API cudnnStatus_t cudnnCreate(cudnnHandle_t *h) { return *h = calloc(1, sizeof(Dnn)), CUDNN_STATUS_SUCCESS; }
API cudnnStatus_t cudnnDestroy(cudnnHandle_t h) { return free(h), CUDNN_STATUS_SUCCESS; }
API cudnnStatus_t cudnnSetStream(cudnnHandle_t h, cudaStream_t s) {
  return ((Dnn *)h)->stream = s, CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnGetStream(cudnnHandle_t h, cudaStream_t *s) {
  return *s = ((Dnn *)h)->stream, CUDNN_STATUS_SUCCESS;
}

typedef struct {
  int name, type;
  int64_t count;
  void *values;
} DnnAttribute;
typedef struct DnnDescriptor {
  int type, references, count, room;
  DnnAttribute *attributes;
  struct Plan *plan; /* of an execution plan that is finalized */
} DnnDescriptor;
typedef struct Plan {
  char name[200];
  double flops;
  int tensors;
  struct {
    int64_t uid;
    double bytes;
  } tensor[64];
} Plan;

static size_t dnn_size(int type) {
  switch (type) {
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR: return 1;
    case CUDNN_TYPE_FRACTION: return 16;
    default: return 4;
  }
}
static DnnAttribute *dnn_attribute(DnnDescriptor *d, int name) {
  for (int i = 0; d && i < d->count; i++)
    if (d->attributes[i].name == name) return &d->attributes[i];
  return NULL;
}
static DnnDescriptor *dnn_child(DnnDescriptor *d, int name, int64_t i) {
  DnnAttribute *a = dnn_attribute(d, name);
  return a && a->type == CUDNN_TYPE_BACKEND_DESCRIPTOR && i < a->count ? ((DnnDescriptor **)a->values)[i] : NULL;
}
static void dnn_drop(DnnDescriptor *d);
static void dnn_clear(DnnAttribute *a) {
  if (a->type == CUDNN_TYPE_BACKEND_DESCRIPTOR)
    for (int64_t i = 0; i < a->count; i++) dnn_drop(((DnnDescriptor **)a->values)[i]);
  free(a->values);
}
static void dnn_drop(DnnDescriptor *d) {
  if (!d || --d->references) return;
  for (int i = 0; i < d->count; i++) dnn_clear(&d->attributes[i]);
  free(d->attributes);
  free(d->plan);
  free(d);
}
static void dnn_set(DnnDescriptor *d, int name, int type, int64_t count, const void *values) {
  size_t size = dnn_size(type) * (size_t)MAX(count, 0);
  void *kept = malloc(MAX(size, 1));
  if (size) memcpy(kept, values, size);
  if (type == CUDNN_TYPE_BACKEND_DESCRIPTOR)
    for (int64_t i = 0; i < count; i++)
      if (((DnnDescriptor **)kept)[i]) ((DnnDescriptor **)kept)[i]->references++;
  DnnAttribute *a = dnn_attribute(d, name);
  if (a)
    dnn_clear(a);
  else {
    if (d->count == d->room)
      d->attributes = realloc(d->attributes, (size_t)(d->room = d->room ? 2 * d->room : 8) * sizeof *d->attributes);
    a = &d->attributes[d->count++];
  }
  *a = (DnnAttribute){name, type, count, kept};
}
static DnnDescriptor *dnn_make(int type) {
  DnnDescriptor *d = calloc(1, sizeof *d);
  d->type = type;
  d->references = 1;
  return d;
}
/* An engine configuration for a graph. */
static void dnn_configure(DnnDescriptor *configuration, DnnDescriptor *graph) {
  DnnDescriptor *engine = dnn_make(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  int64_t index = 0;
  dnn_set(engine, CUDNN_ATTR_ENGINE_OPERATION_GRAPH, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &graph);
  dnn_set(engine, CUDNN_ATTR_ENGINE_GLOBAL_INDEX, CUDNN_TYPE_INT64, 1, &index);
  dnn_set(configuration, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &engine);
  dnn_drop(engine);
}

/* Dimensions of a tensor descriptor, by its attribute in an operation; 0 where there is none. */
static int dnn_dims(DnnDescriptor *operation, int name, int64_t dims[8]) {
  DnnAttribute *a = dnn_attribute(dnn_child(operation, name, 0), CUDNN_ATTR_TENSOR_DIMENSIONS);
  if (!a || a->count > 8) return 0;
  memcpy(dims, a->values, (size_t)a->count * 8);
  return (int)a->count;
}
static double product(const int64_t *dims, int n) {
  double all = 1;
  for (int i = 0; i < n; i++) all *= (double)dims[i];
  return all;
}
static double convolution_flops(DnnDescriptor *operation, int w, int y) {
  int64_t weight[8], result[8];
  int n = dnn_dims(operation, w, weight), k = dnn_dims(operation, y, result);
  return n && k ? 2 * product(weight + 1, n - 1) * product(result, k) : 0;
}
static double matmul_flops(DnnDescriptor *operation, int left, int out) {
  int64_t a[8], c[8];
  int n = dnn_dims(operation, left, a), k = dnn_dims(operation, out, c);
  return n && k ? 2 * product(c, k) * (double)a[n - 1] : 0;
}
/* Q K^T and P V: Q is (B, H, T, d), K (B, H, S, d), V (B, H, S, e). */
static double attention_flops(DnnDescriptor *operation, int q_name, int k_name, int v_name) {
  int64_t q[8], k[8], v[8];
  if (dnn_dims(operation, q_name, q) != 4 || dnn_dims(operation, k_name, k) != 4 || dnn_dims(operation, v_name, v) != 4)
    return 0;
  return 2.0 * (double)q[0] * (double)q[1] * (double)q[2] * (double)k[2] * (double)(q[3] + v[3]);
}
static size_t dnn_type_size(int type) {
  switch (type) {
    case CUDNN_DATA_DOUBLE:
    case CUDNN_DATA_INT64: return 8;
    case CUDNN_DATA_HALF:
    case CUDNN_DATA_BFLOAT16: return 2;
    case CUDNN_DATA_INT8:
    case CUDNN_DATA_UINT8:
    case CUDNN_DATA_BOOLEAN:
    case CUDNN_DATA_FP8_E4M3:
    case CUDNN_DATA_FP8_E5M2: return 1;
    default: return 4;
  }
}
static void plan_tensor(Plan *plan, DnnDescriptor *t) {
  DnnAttribute *virtual_ = dnn_attribute(t, CUDNN_ATTR_TENSOR_IS_VIRTUAL),
               *uid = dnn_attribute(t, CUDNN_ATTR_TENSOR_UNIQUE_ID);
  DnnAttribute *dims = dnn_attribute(t, CUDNN_ATTR_TENSOR_DIMENSIONS),
               *type = dnn_attribute(t, CUDNN_ATTR_TENSOR_DATA_TYPE);
  if ((virtual_ && *(char *)virtual_->values) || !uid || !dims || !type || plan->tensors == 64) return;
  int64_t id = *(int64_t *)uid->values;
  for (int i = 0; i < plan->tensors; i++)
    if (plan->tensor[i].uid == id) return;
  plan->tensor[plan->tensors].uid = id;
  plan->tensor[plan->tensors++].bytes =
      product(dims->values, (int)dims->count) * (double)dnn_type_size(*(int *)type->values);
}
/* All tensors of an operation, those of the operations inside it (an attention's softmax) as well. */
static void plan_tensors(Plan *plan, DnnDescriptor *operation) {
  for (int i = 0; i < operation->count; i++) {
    DnnAttribute *a = &operation->attributes[i];
    for (int64_t k = 0; a->type == CUDNN_TYPE_BACKEND_DESCRIPTOR && k < a->count; k++) {
      DnnDescriptor *child = ((DnnDescriptor **)a->values)[k];
      if (child && child->type == CUDNN_BACKEND_TENSOR_DESCRIPTOR)
        plan_tensor(plan, child);
      else if (child)
        plan_tensors(plan, child);
    }
  }
}
static const struct {
  int type;
  const char *name;
} operation_names[] = {
    {CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR, "convolution"},
    {CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR, "convolution_backward_data"},
    {CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR, "convolution_backward_filter"},
    {CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, "matmul"},
    {CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, "reduction"},
    {CUDNN_BACKEND_OPERATION_NORM_FORWARD_DESCRIPTOR, "norm"},
    {CUDNN_BACKEND_OPERATION_NORM_BACKWARD_DESCRIPTOR, "norm_backward"},
    {CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, "pointwise"},
};
/* Names a plan by its operations: those of an attention, written out by the caller, by their two or five products. */
static void name_plan(Plan *plan, DnnAttribute *operations) {
  int matmuls = 0, forward = 0, backward = 0;
  DnnDescriptor **list = operations->values;
  for (int64_t i = 0; i < operations->count; i++) {
    matmuls += list[i]->type == CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR;
#if CUDNN_VERSION >= 91300
    forward |= list[i]->type == CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR;
#endif
#if CUDNN_VERSION >= 91500
    backward |= list[i]->type == CUDNN_BACKEND_OPERATION_SDPA_BWD_DESCRIPTOR;
#endif
  }
  if (forward || matmuls == 2) snprintf(plan->name, sizeof plan->name, "attention");
  if (backward || matmuls >= 5) snprintf(plan->name, sizeof plan->name, "attention_backward");
  for (int64_t i = 0; !plan->name[0] && i < operations->count; i++)
    for (size_t k = 0; k < sizeof operation_names / sizeof *operation_names; k++)
      if (operation_names[k].type == list[i]->type)
        snprintf(plan->name, sizeof plan->name, "%s", operation_names[k].name);
  if (!plan->name[0]) snprintf(plan->name, sizeof plan->name, "operation %d", operations->count ? list[0]->type : -1);
}
static Plan *make_plan(DnnDescriptor *descriptor) {
  DnnDescriptor *configuration = dnn_child(descriptor, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, 0);
  DnnDescriptor *engine = dnn_child(configuration, CUDNN_ATTR_ENGINECFG_ENGINE, 0);
  DnnDescriptor *graph = dnn_child(engine, CUDNN_ATTR_ENGINE_OPERATION_GRAPH, 0);
  DnnAttribute *operations = dnn_attribute(graph, CUDNN_ATTR_OPERATIONGRAPH_OPS);
  Plan *plan = calloc(1, sizeof *plan);
  if (!operations) return plan;
  name_plan(plan, operations);
  for (int64_t i = 0; i < operations->count; i++) {
    DnnDescriptor *o = ((DnnDescriptor **)operations->values)[i];
    switch (o->type) {
      case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR:
        plan->flops += convolution_flops(o, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                                         CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y);
        break;
      case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR:
        plan->flops += convolution_flops(o, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                                         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY);
        break;
      case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR:
        plan->flops += convolution_flops(o, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                                         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY);
        break;
      case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR:
        plan->flops += matmul_flops(o, CUDNN_ATTR_OPERATION_MATMUL_ADESC, CUDNN_ATTR_OPERATION_MATMUL_CDESC);
        break;
#if CUDNN_VERSION >= 91300
      case CUDNN_BACKEND_OPERATION_SDPA_FWD_DESCRIPTOR:
        plan->flops += attention_flops(o, CUDNN_ATTR_OPERATION_SDPA_FWD_QDESC, CUDNN_ATTR_OPERATION_SDPA_FWD_KDESC,
                                       CUDNN_ATTR_OPERATION_SDPA_FWD_VDESC);
        break;
#endif
#if CUDNN_VERSION >= 91500
      case CUDNN_BACKEND_OPERATION_SDPA_BWD_DESCRIPTOR: /* five products to the forward's two */
        plan->flops += 2.5 * attention_flops(o, CUDNN_ATTR_OPERATION_SDPA_BWD_QDESC,
                                             CUDNN_ATTR_OPERATION_SDPA_BWD_KDESC, CUDNN_ATTR_OPERATION_SDPA_BWD_VDESC);
        break;
#endif
      default: break;
    }
    plan_tensors(plan, o);
  }
  return plan;
}

API cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *d) {
  return *d = dnn_make(type), CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t d) {
  LOCKED;
  dnn_drop(d);
  return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendInitialize(cudnnBackendDescriptor_t d) { return CUDNN_STATUS_SUCCESS; }
API cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t d, cudnnBackendAttributeName_t name,
                                           cudnnBackendAttributeType_t type, int64_t n, const void *v) {
  LOCKED;
  dnn_set(d, name, type, n, v);
  return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t d) {
  LOCKED;
  DnnDescriptor *x = d;
  if (x->type == CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR && !x->plan) x->plan = make_plan(x);
  return CUDNN_STATUS_SUCCESS;
}
/* What an attribute holds, and what a GPU's cuDNN would have added: results of heuristics, a workspace of 0 bytes.
 * Where values are descriptors the caller made them, to be filled. */
API cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const d, cudnnBackendAttributeName_t name,
                                           cudnnBackendAttributeType_t type, int64_t wanted, int64_t *n, void *out) {
  LOCKED;
  DnnDescriptor *x = (DnnDescriptor *)d;
  if (name == CUDNN_ATTR_ENGINEHEUR_RESULTS) {
    DnnDescriptor *graph = dnn_child(x, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, 0);
    if (n) *n = 1;
    if (wanted > 0 && out) dnn_configure(((DnnDescriptor **)out)[0], graph);
    return CUDNN_STATUS_SUCCESS;
  }
  DnnAttribute *a = dnn_attribute(x, name);
  if (a) {
    int64_t given = MIN(a->count, wanted);
    if (n) *n = a->count;
    for (int64_t i = 0; out && a->type == CUDNN_TYPE_BACKEND_DESCRIPTOR && i < given; i++) {
      DnnDescriptor *from = ((DnnDescriptor **)a->values)[i], *to = ((DnnDescriptor **)out)[i];
      for (int k = 0; to && to != from && k < from->count; k++)
        dnn_set(to, from->attributes[k].name, from->attributes[k].type, from->attributes[k].count,
                from->attributes[k].values);
    }
    if (out && a->type != CUDNN_TYPE_BACKEND_DESCRIPTOR && given > 0)
      memcpy(out, a->values, dnn_size(a->type) * (size_t)given);
    return CUDNN_STATUS_SUCCESS;
  }
  int one = name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE || name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT ||
            name == CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE || name == CUDNN_ATTR_ENGINECFG_SHARED_MEMORY_USED;
  if (n) *n = one;
  if (one && out && wanted > 0) {
    memset(out, 0, dnn_size(type));
    if (name == CUDNN_ATTR_OPERATIONGRAPH_ENGINE_GLOBAL_COUNT) *(int64_t *)out = 1;
  }
  return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendExecute(cudnnHandle_t h, cudnnBackendDescriptor_t d, cudnnBackendDescriptor_t pack) {
  LOCKED;
  Plan *plan = ((DnnDescriptor *)d)->plan;
  if (!plan) return CUDNN_STATUS_BAD_PARAM;
  Stream *s = stream_of(((Dnn *)h)->stream);
  DnnAttribute *uids = dnn_attribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS),
               *data = dnn_attribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS);
  double bytes = 0;
  for (int64_t i = 0; uids && data && i < uids->count && i < data->count; i++) {
    uintptr_t p = ((uintptr_t *)data->values)[i];
    for (int k = 0; k < plan->tensors; k++)
      if (plan->tensor[k].uid == ((int64_t *)uids->values)[i]) bytes += plan->tensor[k].bytes;
    if (in_space(p) && !block_of((void *)p)) complain("cuDNN %s: a tensor's memory is not allocated", plan->name);
    note_use(s, (void *)p);
  }
  return submit((Work){"cudnn", plan->name, ONE, ONE, 0, 0, bytes, plan->flops}, s) ? CUDNN_STATUS_EXECUTION_FAILED
                                                                                    : CUDNN_STATUS_SUCCESS;
}

/* cuDNN's older calls that torch still makes: their descriptors are the real library's, which needs no GPU for them. */
static cudnnStatus_t dnn_launch(cudnnHandle_t h, const char *name) {
  return submit((Work){"cudnn", name, ONE, ONE, 0, 0, 0, 0}, stream_of(((Dnn *)h)->stream))
             ? CUDNN_STATUS_EXECUTION_FAILED
             : CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnPoolingForward(cudnnHandle_t h, const cudnnPoolingDescriptor_t p, const void *al,
                                      const cudnnTensorDescriptor_t xd, const void *x, const void *be,
                                      const cudnnTensorDescriptor_t yd, void *y) {
  return dnn_launch(h, "pooling");
}
API cudnnStatus_t cudnnBatchNormalizationForwardInference(cudnnHandle_t h, cudnnBatchNormMode_t m, const void *al,
                                                          const void *be, const cudnnTensorDescriptor_t xd,
                                                          const void *x, const cudnnTensorDescriptor_t yd, void *y,
                                                          const cudnnTensorDescriptor_t bd, const void *scale,
                                                          const void *bias, const void *mean, const void *var,
                                                          double eps) {
  return dnn_launch(h, "batch_norm_inference");
}
API cudnnStatus_t cudnnDropoutGetStatesSize(cudnnHandle_t h, size_t *n) { return *n = 1 << 20, CUDNN_STATUS_SUCCESS; }

/* ==================================================================================================================
 * cuSOLVER: factorisations and eigenvalues, one launch each. Nothing is computed, `info` stays 0. */

typedef struct {
  cudaStream_t stream;
} Solver;
API cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t *h) {
  return *h = calloc(1, sizeof(Solver)), CUSOLVER_STATUS_SUCCESS;
}
API cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t h) { return free(h), CUSOLVER_STATUS_SUCCESS; }
API cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t h, cudaStream_t s) {
  return ((Solver *)h)->stream = s, CUSOLVER_STATUS_SUCCESS;
}
API cusolverStatus_t cusolverDnGetStream(cusolverDnHandle_t h, cudaStream_t *s) {
  return *s = ((Solver *)h)->stream, CUSOLVER_STATUS_SUCCESS;
}
API cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t *p) {
  return *p = calloc(1, 64), CUSOLVER_STATUS_SUCCESS;
}
API cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t p) { return free(p), CUSOLVER_STATUS_SUCCESS; }

static cusolverStatus_t solve(cusolverDnHandle_t h, const char *what, int64_t m, int64_t n, cudaDataType type,
                              double flops, void *info) {
  LOCKED;
  Stream *s = stream_of(((Solver *)h)->stream);
  if (info && in_space((uintptr_t)info) && !s->capture) memset(shadow_of(info), 0, 4);
  char name[96];
  snprintf(name, sizeof name, "%s %ldx%ld %s", what, (long)m, (long)n, type_name(type));
  double bytes = 2.0 * (double)m * (double)n * (double)type_size(type),
         ms = 2e-2 + flops / (0.1 * type_rate(CUDA_R_64F));
  return submit((Work){"solver", name, ONE, ONE, 0, ms, bytes, flops}, s) ? CUSOLVER_STATUS_EXECUTION_FAILED
                                                                          : CUSOLVER_STATUS_SUCCESS;
}
#define CUBE(n) ((double)(n) * (double)(n) * (double)(n))
#define SIZES *dev = *host = 0, CUSOLVER_STATUS_SUCCESS
API cusolverStatus_t cusolverDnXpotrf_bufferSize(cusolverDnHandle_t h, cusolverDnParams_t p, cublasFillMode_t u,
                                                 int64_t n, cudaDataType at, const void *a, int64_t la, cudaDataType c,
                                                 size_t *dev, size_t *host) {
  return SIZES;
}
API cusolverStatus_t cusolverDnXpotrf(cusolverDnHandle_t h, cusolverDnParams_t p, cublasFillMode_t u, int64_t n,
                                      cudaDataType at, void *a, int64_t la, cudaDataType c, void *db, size_t dn,
                                      void *hb, size_t hn, int *info) {
  return solve(h, "potrf", n, n, at, CUBE(n) / 3, info);
}
API cusolverStatus_t cusolverDnXpotrs(cusolverDnHandle_t h, cusolverDnParams_t p, cublasFillMode_t u, int64_t n,
                                      int64_t k, cudaDataType at, const void *a, int64_t la, cudaDataType bt, void *b,
                                      int64_t lb, int *info) {
  return solve(h, "potrs", n, k, at, 2.0 * (double)n * (double)n * (double)k, info);
}
API cusolverStatus_t cusolverDnXsyevd_bufferSize(cusolverDnHandle_t h, cusolverDnParams_t p, cusolverEigMode_t j,
                                                 cublasFillMode_t u, int64_t n, cudaDataType at, const void *a,
                                                 int64_t la, cudaDataType wt, const void *w, cudaDataType c,
                                                 size_t *dev, size_t *host) {
  return SIZES;
}
API cusolverStatus_t cusolverDnXsyevd(cusolverDnHandle_t h, cusolverDnParams_t p, cusolverEigMode_t j,
                                      cublasFillMode_t u, int64_t n, cudaDataType at, void *a, int64_t la,
                                      cudaDataType wt, void *w, cudaDataType c, void *db, size_t dn, void *hb,
                                      size_t hn, int *info) {
  return solve(h, "syevd", n, n, at, 9 * CUBE(n), info);
}
API cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t h, cusolverDnParams_t p, cusolverEigMode_t j,
                                                       cublasFillMode_t u, int64_t n, cudaDataType at, const void *a,
                                                       int64_t la, cudaDataType wt, const void *w, cudaDataType c,
                                                       size_t *dev, size_t *host, int64_t batch) {
  return SIZES;
}
API cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t h, cusolverDnParams_t p, cusolverEigMode_t j,
                                            cublasFillMode_t u, int64_t n, cudaDataType at, void *a, int64_t la,
                                            cudaDataType wt, void *w, cudaDataType c, void *db, size_t dn, void *hb,
                                            size_t hn, int *info, int64_t batch) {
  return solve(h, "syev_batched", n, n * batch, at, 9 * CUBE(n) * (double)batch, info);
}
API cusolverStatus_t cusolverDnXgeqrf_bufferSize(cusolverDnHandle_t h, cusolverDnParams_t p, int64_t m, int64_t n,
                                                 cudaDataType at, const void *a, int64_t la, cudaDataType tt,
                                                 const void *t, cudaDataType c, size_t *dev, size_t *host) {
  return SIZES;
}
API cusolverStatus_t cusolverDnXgeqrf(cusolverDnHandle_t h, cusolverDnParams_t p, int64_t m, int64_t n, cudaDataType at,
                                      void *a, int64_t la, cudaDataType tt, void *t, cudaDataType c, void *db,
                                      size_t dn, void *hb, size_t hn, int *info) {
  return solve(h, "geqrf", m, n, at, 2.0 * (double)m * (double)n * (double)n, info);
}
/* The typed calls that torch makes for linalg.cholesky, solve, qr and svd of single matrices. */
#define TYPED_SOLVERS(X, T, TYPE)                                                                                     \
  API cusolverStatus_t cusolverDn##X##potrf_bufferSize(cusolverDnHandle_t h, cublasFillMode_t u, int n, T *a, int la, \
                                                       int *w) {                                                      \
    return *w = 1, CUSOLVER_STATUS_SUCCESS;                                                                           \
  }                                                                                                                   \
  API cusolverStatus_t cusolverDn##X##potrf(cusolverDnHandle_t h, cublasFillMode_t u, int n, T *a, int la, T *w,      \
                                            int k, int *i) {                                                          \
    return solve(h, "potrf", n, n, TYPE, CUBE(n) / 3, i);                                                             \
  }                                                                                                                   \
  API cusolverStatus_t cusolverDn##X##getrf_bufferSize(cusolverDnHandle_t h, int m, int n, T *a, int la, int *w) {    \
    return *w = 1, CUSOLVER_STATUS_SUCCESS;                                                                           \
  }                                                                                                                   \
  API cusolverStatus_t cusolverDn##X##getrf(cusolverDnHandle_t h, int m, int n, T *a, int la, T *w, int *p, int *i) { \
    return solve(h, "getrf", m, n, TYPE, 2 * CUBE(MIN(m, n)) / 3, i);                                                 \
  }                                                                                                                   \
  API cusolverStatus_t cusolverDn##X##getrs(cusolverDnHandle_t h, cublasOperation_t t, int n, int k, const T *a,      \
                                            int la, const int *p, T *b, int lb, int *i) {                             \
    return solve(h, "getrs", n, k, TYPE, 2.0 * (double)n * (double)n * (double)k, i);                                 \
  }                                                                                                                   \
  API cusolverStatus_t cusolverDn##X##syevd_bufferSize(cusolverDnHandle_t h, cusolverEigMode_t j, cublasFillMode_t u, \
                                                       int n, const T *a, int la, const T *e, int *w) {               \
    return *w = 1, CUSOLVER_STATUS_SUCCESS;                                                                           \
  }                                                                                                                   \
  API cusolverStatus_t cusolverDn##X##syevd(cusolverDnHandle_t h, cusolverEigMode_t j, cublasFillMode_t u, int n,     \
                                            T *a, int la, T *e, T *w, int k, int *i) {                                \
    return solve(h, "syevd", n, n, TYPE, 9 * CUBE(n), i);                                                             \
  }
TYPED_SOLVERS(S, float, CUDA_R_32F)
TYPED_SOLVERS(D, double, CUDA_R_64F)

/* ==================================================================================================================
 * NCCL. Nothing is exchanged: what a rank receives is what it sent. */

typedef struct {
  int rank, size;
} Comm;
static ncclResult_t make_comm(ncclComm_t *c, int size, int rank) {
  Comm *x = calloc(1, sizeof *x);
  *x = (Comm){rank, size};
  return *c = (ncclComm_t)x, ncclSuccess;
}
API ncclResult_t ncclGetVersion(int *v) { return *v = NCCL_VERSION_CODE, ncclSuccess; }
API ncclResult_t ncclGetUniqueId(ncclUniqueId *u) { return memset(u, 1, sizeof *u), ncclSuccess; }
API ncclResult_t ncclCommInitRank(ncclComm_t *c, int n, ncclUniqueId u, int r) { return make_comm(c, n, r); }
API ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int n, ncclUniqueId u, int r, ncclConfig_t *f) {
  return make_comm(c, n, r);
}
API ncclResult_t ncclCommInitRankScalable(ncclComm_t *c, int n, int r, int k, ncclUniqueId *u, ncclConfig_t *f) {
  return make_comm(c, n, r);
}
API ncclResult_t ncclCommSplit(ncclComm_t p, int color, int key, ncclComm_t *c, ncclConfig_t *f) {
  /* The size of the part is known to the other ranks only. */
  if (color == NCCL_SPLIT_NOCOLOR) return *c = NULL, ncclSuccess;
  return make_comm(c, ((Comm *)p)->size, ((Comm *)p)->rank);
}
API ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *r) { return *r = ncclSuccess, ncclSuccess; }
API ncclResult_t ncclCommDestroy(ncclComm_t c) { return ncclSuccess; } /* watchdogs may still ask after it */
API ncclResult_t ncclCommAbort(ncclComm_t c) { return ncclSuccess; }
API ncclResult_t ncclCommFinalize(ncclComm_t c) { return ncclSuccess; }
API ncclResult_t ncclCommCount(const ncclComm_t c, int *n) { return *n = ((Comm *)c)->size, ncclSuccess; }
API ncclResult_t ncclCommUserRank(const ncclComm_t c, int *r) { return *r = ((Comm *)c)->rank, ncclSuccess; }
API ncclResult_t ncclCommCuDevice(const ncclComm_t c, int *d) { return *d = device, ncclSuccess; }
API ncclResult_t ncclCommRegister(const ncclComm_t c, void *p, size_t n, void **h) { return *h = p, ncclSuccess; }
API ncclResult_t ncclCommDeregister(const ncclComm_t c, void *h) { return ncclSuccess; }
API ncclResult_t ncclMemAlloc(void **p, size_t n) { return cudaMalloc(p, n) ? ncclUnhandledCudaError : ncclSuccess; }
API ncclResult_t ncclMemFree(void *p) { return cudaFree(p) ? ncclUnhandledCudaError : ncclSuccess; }
API ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
API ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }
API const char *ncclGetErrorString(ncclResult_t r) {
  return r == ncclSuccess ? "no error" : "error of the stand-in's NCCL";
}
API const char *ncclGetLastError(ncclComm_t c) { return ""; }
API ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t *o, void *s, ncclDataType_t d, ncclScalarResidence_t r,
                                          ncclComm_t c) {
  return *o = ncclSum, ncclSuccess;
}
API ncclResult_t ncclRedOpDestroy(ncclRedOp_t o, ncclComm_t c) { return ncclSuccess; }

static size_t nccl_size(ncclDataType_t d) {
  switch (d) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64: return 8;
    default: return 4;
  }
}
/* `sent` and `received` in elements. The part received is filled from the part sent, as often as it fits. */
static ncclResult_t exchange(const char *what, const void *from, size_t sent, void *to, size_t received,
                             ncclDataType_t type, ncclComm_t c, cudaStream_t stream) {
  LOCKED;
  Stream *s = stream_of(stream);
  size_t width = nccl_size(type), n = MIN(sent, received) * width;
  char name[96];
  snprintf(name, sizeof name, "%s of %d", what, ((Comm *)c)->size);
  const void *ends[] = {from, to};
  for (int i = 0; i < 2; i++) {
    if (in_space((uintptr_t)ends[i]) && !allocated((uintptr_t)ends[i], (i ? received : sent) * width))
      complain("NCCL %s goes past its allocation", what);
    note_use(s, ends[i]);
  }
  double bytes = (double)MAX(sent, received) * (double)width;
  if (submit((Work){"nccl", name, ONE, ONE, 0, 1e-2 + bytes / 1.5e8, bytes, 0}, s)) return ncclUnhandledCudaError;
  if (!s->capture && from && to && n && received * width <= copy_limit())
    for (size_t at = 0; at + n <= received * width; at += n) memmove((char *)shadow_of(to) + at, shadow_of(from), n);
  return ncclSuccess;
}
#define SIZE(c) ((size_t)((Comm *)(c))->size)
API ncclResult_t ncclAllReduce(const void *s, void *r, size_t n, ncclDataType_t d, ncclRedOp_t o, ncclComm_t c,
                               cudaStream_t t) {
  return exchange("all_reduce", s, n, r, n, d, c, t);
}
API ncclResult_t ncclReduce(const void *s, void *r, size_t n, ncclDataType_t d, ncclRedOp_t o, int root, ncclComm_t c,
                            cudaStream_t t) {
  return exchange("reduce", s, n, r, n, d, c, t);
}
API ncclResult_t ncclBroadcast(const void *s, void *r, size_t n, ncclDataType_t d, int root, ncclComm_t c,
                               cudaStream_t t) {
  return exchange("broadcast", s, n, r, n, d, c, t);
}
API ncclResult_t ncclBcast(void *p, size_t n, ncclDataType_t d, int root, ncclComm_t c, cudaStream_t t) {
  return exchange("broadcast", p, n, p, n, d, c, t);
}
API ncclResult_t ncclAllGather(const void *s, void *r, size_t n, ncclDataType_t d, ncclComm_t c, cudaStream_t t) {
  return exchange("all_gather", s, n, r, n * SIZE(c), d, c, t);
}
API ncclResult_t ncclReduceScatter(const void *s, void *r, size_t n, ncclDataType_t d, ncclRedOp_t o, ncclComm_t c,
                                   cudaStream_t t) {
  return exchange("reduce_scatter", s, n * SIZE(c), r, n, d, c, t);
}
API ncclResult_t ncclSend(const void *s, size_t n, ncclDataType_t d, int peer, ncclComm_t c, cudaStream_t t) {
  return exchange("send", s, n, NULL, 0, d, c, t);
}
API ncclResult_t ncclRecv(void *r, size_t n, ncclDataType_t d, int peer, ncclComm_t c, cudaStream_t t) {
  return exchange("receive", NULL, 0, r, n, d, c, t);
}

/* ==================================================================================================================
 * NVML, as far as torch asks it: which devices there are, and that they share no memory with other machines. */

enum { NVML_SUCCESS = 0, NVML_NOT_SUPPORTED = 3 };
API int nvmlInit(void) { return NVML_SUCCESS; }
API int nvmlInit_v2(void) { return NVML_SUCCESS; }
API int nvmlShutdown(void) { return NVML_SUCCESS; }
API const char *nvmlErrorString(int code) { return code ? "Not Supported" : "Success"; }
API int nvmlSystemGetCudaDriverVersion_v2(int *v) { return *v = CUDART_VERSION, NVML_SUCCESS; }
API int nvmlDeviceGetCount_v2(unsigned *n) { return *n = (unsigned)device_count(), NVML_SUCCESS; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { return *h = &contexts[i], NVML_SUCCESS; }
API int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **h) { return *h = &contexts[0], NVML_SUCCESS; }
API int nvmlDeviceGetHandleByUUID(const char *id, void **h) { return *h = &contexts[0], NVML_SUCCESS; }
API int nvmlDeviceGetUUID(void *h, char *s, unsigned n) {
  return snprintf(s, n, "GPU-%08x", (unsigned)((char *)h - contexts)), NVML_SUCCESS;
}
API int nvmlDeviceGetComputeRunningProcesses(void *h, unsigned *n, void *found) { return *n = 0, NVML_SUCCESS; }
API int nvmlDeviceGetGpuFabricInfoV(void *h, void *info) { return NVML_NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemoteDeviceType(void *h, unsigned link, int *type) { return NVML_NOT_SUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *h, unsigned link, void *info) { return NVML_NOT_SUPPORTED; }
API int nvmlDeviceGetP2PStatus(void *a, void *b, int index, int *status) { return NVML_NOT_SUPPORTED; }

/* ==================================================================================================================
 * Libraries opened by name are found here. For all others the loader must see the true caller, whose run path counts:
 * the call at the end is compiled to a jump (-O2). */

API void *dlopen(const char *file, int mode) {
  static void *(*real)(const char *, int);
  if (!real) real = (void *(*)(const char *, int))dlsym(RTLD_NEXT, "dlopen");
  static const char *const ours[] = {"libcuda.so",   "libcudart.so", "libcublasLt.so",
                                     "libcublas.so", "libnccl.so",   "libnvidia-ml.so"};
  for (size_t i = 0; file && i < sizeof ours / sizeof *ours; i++) {
    Dl_info self;
    if (strstr(file, ours[i]) && dladdr((void *)cuInit, &self)) file = self.dli_fname;
  }
  return real(file, mode);
}
